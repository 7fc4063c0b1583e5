// Chats as files: JSON that can be read in again, and Markdown for people.

import { element } from "./dom.js";
import { fullText, newChat, pathOf, randomId } from "./tree.js";

const FORMAT = "sapwood-chats";
const VERSION = 1;
const MAX_MESSAGES = 5_000;

export function exportJson(chats, name) {
  const text = JSON.stringify({ format: FORMAT, version: VERSION, chats }, null, 1);
  save(`${name}.json`, "application/json", text);
}

/** The branch that is shown, with thinking folded. */
export function exportMarkdown(chat) {
  const parts = [`# ${chat.title}`];
  if (chat.system) parts.push(`> System: ${chat.system.replace(/\n/g, "\n> ")}`);
  for (const message of pathOf(chat)) {
    parts.push(message.role === "user" ? "## You" : `## ${message.model || "Model"}`);
    if (message.reasoning) {
      parts.push("<details><summary>Thinking</summary>", message.reasoning, "</details>");
    }
    parts.push(fullText(message) || "(no answer)");
  }
  save(`${fileName(chat.title)}.md`, "text/markdown", `${parts.join("\n\n")}\n`);
}

export const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "chat";

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/**
 * The chats of an exported file, with new ids, so that nothing that is there is replaced.
 * Raises Error, in words for the user, unless every part is what an export has.
 */
export function readChats(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`the file is not JSON (${error.message})`);
  }
  if (file?.format !== FORMAT || file.version !== VERSION || !Array.isArray(file.chats)) {
    throw new Error("it is not an export of this page: it needs the format “sapwood-chats”, version 1");
  }
  return file.chats.map(readChat);
}

function readChat(given, at) {
  const where = `chat ${at + 1}`;
  const chat = newChat();
  for (const name of ["title", "model", "system"]) chat[name] = string(given?.[name], `${where}: ${name}`);
  for (const name of ["createdMs", "updatedMs"]) chat[name] = number(given[name], `${where}: ${name}`);
  if (!Array.isArray(given.messages) || given.messages.length > MAX_MESSAGES) {
    throw new Error(`${where}: messages must be a list of at most ${MAX_MESSAGES}`);
  }
  const ids = new Map();
  for (const [i, message] of given.messages.entries()) {
    const read = readMessage(message, `${where}, message ${i + 1}`);
    // A parent comes before its children, so there can be no circle.
    if (message.parent !== null && !ids.has(message.parent)) {
      throw new Error(`${where}, message ${i + 1}: its parent is not before it`);
    }
    read.parent = ids.get(message.parent) ?? null;
    ids.set(string(message.id, `${where}, message ${i + 1}: id`), read.id);
    chat.messages.push(read);
  }
  chat.leaf = ids.get(given.leaf) ?? chat.messages.at(-1)?.id ?? null;
  return chat;
}

function readMessage(given, where) {
  if (given?.role !== "user" && given?.role !== "assistant") {
    throw new Error(`${where}: role must be user or assistant`);
  }
  const message = { id: randomId(), parent: null, role: given.role };
  message.createdMs = number(given.createdMs, `${where}: createdMs`);
  message.content = string(given.content, `${where}: content`);
  for (const name of ["model", "reasoning", "finish", "error"]) {
    if (given[name] != null) message[name] = string(given[name], `${where}: ${name}`);
  }
  if (given.thinkingMs != null) message.thinkingMs = number(given.thinkingMs, `${where}: thinkingMs`);
  if (given.files != null) {
    if (!Array.isArray(given.files)) throw new Error(`${where}: files must be a list`);
    message.files = given.files.map((file) => readFile(file, where));
  }
  if (given.stats != null) {
    message.stats = {};
    for (const name of ["firstMs", "numTokens", "tokensPerS"]) {
      if (given.stats[name] != null) message.stats[name] = number(given.stats[name], `${where}: ${name}`);
    }
  }
  return message;
}

function readFile(file, where) {
  const name = string(file?.name, `${where}: the name of a file`);
  if (file.image == null) return { name, text: string(file.text, `${where}: the text of a file`) };
  const image = string(file.image, `${where}: the image of a file`);
  // Another address would be fetched by this browser as soon as the chat is shown.
  if (!/^data:image\/(png|jpeg|webp|gif);base64,/.test(image)) {
    throw new Error(`${where}: the image of a file must be a data URL of an image`);
  }
  return { name, image };
}

function string(value, where) {
  if (typeof value !== "string") throw new Error(`${where} must be a text`);
  return value;
}

function number(value, where) {
  if (!Number.isFinite(value)) throw new Error(`${where} must be a number`);
  return value;
}
