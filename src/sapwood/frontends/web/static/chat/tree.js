// A chat: messages that each know the one before, so that an edit or another answer is a branch and
// nothing is lost.
//
//   chat     {id, title, createdMs, updatedMs, model, system, leaf, messages}
//            leaf: id of the last message that is shown, or null; messages: in the order in which they came
//   message  {id, parent, role, content, createdMs}; parent: id of the message before, or null
//     user       files: [{name, text}], of pictures [{name, image}] with a data URL
//     assistant  model, reasoning, thinkingMs, finish, error, stats: {firstMs, numTokens, tokensPerS}

const TITLE_LENGTH = 60;

export function newChat() {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? randomId(),
    title: "",
    createdMs: now,
    updatedMs: now,
    model: "",
    system: "",
    leaf: null,
    messages: [],
  };
}

/** Without HTTPS, and elsewhere than on localhost, browsers have no randomUUID. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Append a message behind `parent`, and show it. */
export function addMessage(chat, parent, fields) {
  const message = { id: randomId(), parent, createdMs: Date.now(), content: "", ...fields };
  chat.messages.push(message);
  chat.leaf = message.id;
  chat.title ||= titleOf(message);
  return message;
}

function titleOf({ content, files }) {
  const text = content.trim().replace(/\s+/g, " ") || files?.[0]?.name || "";
  return text.length > TITLE_LENGTH ? `${text.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : text;
}

/** The messages that are shown, the first one first. */
export function pathOf(chat, leaf = chat.leaf) {
  const byId = new Map(chat.messages.map((message) => [message.id, message]));
  const path = [];
  for (let at = byId.get(leaf); at; at = byId.get(at.parent)) path.push(at);
  return path.reverse();
}

/** The branches that begin where this message stands, itself included. */
export function siblingsOf(chat, message) {
  return chat.messages.filter((one) => one.parent === message.parent);
}

/** Show the branch of this message, to its newest end. */
export function showBranch(chat, message) {
  chat.leaf = message.id;
  for (;;) {
    const child = chat.messages.findLast((one) => one.parent === chat.leaf);
    if (!child) return;
    chat.leaf = child.id;
  }
}

/** What the model is sent of a path: without questions that got no answer, so that roles go on alternating. */
export function requestMessages(chat, path) {
  const sent = chat.system.trim() ? [{ role: "system", content: chat.system.trim() }] : [];
  path.forEach((message, i) => {
    const answer = message.role === "assistant" ? message : path[i + 1];
    if (answer && !answer.content && !answer.reasoning) return;
    const one = { role: message.role, content: shownParts(message) };
    if (message.role === "assistant" && !message.content) one.reasoning_content = message.reasoning;
    sent.push(one);
  });
  return sent;
}

/** What a request says of a message: its text; if it shows pictures, they come before as parts. */
function shownParts(message) {
  const images = (message.files ?? []).filter(({ image }) => image);
  const text = fullText(message);
  if (!images.length) return text;
  const shown = images.map(({ image }) => ({ type: "image_url", image_url: { url: image } }));
  return text ? [...shown, { type: "text", text }] : shown;
}

/** A message with its text files, each in a fence that its text cannot close. */
export function fullText({ content, files = [] }) {
  const texts = files.filter(({ text }) => text !== undefined);
  const parts = texts.map(({ name, text }) => {
    const runs = text.match(/`+/g) ?? [];
    const fence = "`".repeat(Math.max(3, ...runs.map((run) => run.length + 1)));
    return `File ${name}:\n${fence}\n${text}\n${fence}`;
  });
  return [...parts, content].filter(Boolean).join("\n\n");
}
