// The chat page: which chat is shown, which answers are being written, and what the controls do.

import { acceptFiles, hasFiles, takeFiles } from "./attachments.js";
import { requestBody, writeAnswer } from "./answer.js";
import { conversationView } from "./conversation.js";
import { byId, fit, notice } from "./dom.js";
import { historyView, undoDelete, warnIfNearlyFull } from "./history.js";
import { chosenModel, showModels } from "./models.js";
import { bindPanels, closeOverlays } from "./panels.js";
import { showPresets } from "./presets.js";
import { readSettings, showSettings } from "./settings.js";
import { openStore } from "./store.js";
import { exportJson, readChats } from "./transfer.js";
import { addMessage, newChat, pathOf, requestMessages, showBranch } from "./tree.js";

const KEEP_EVERY_MS = 2000;
const SYSTEM = "sapwood-system"; // the system prompt of new chats

const prompt = byId("prompt");
/** By id of the chat: the answer that is being written there, {message, stop}. */
const running = new Map();
const keptAtMs = new Map();
const told = new Set();
let chat = newChat();

const conversation = conversationView({
  edit: ({ parent, files }, text) => {
    if (isIdle() && (text.trim() || files?.length)) say(parent, text, files);
  },
  regenerate: ({ parent }) => isIdle() && ask(parent),
  proceed: (message) => isIdle() && write(message, { continue_final_message: true }),
  retry: (message) => {
    if (!isIdle()) return;
    if (message.content || message.reasoning) ask(message.parent);
    else write(message);
  },
  turnTo: (message) => {
    if (!isIdle()) return;
    showBranch(chat, message);
    keep(chat);
    show();
  },
});
const list = historyView({
  open: (one) => (location.hash = one.id),
  rename: async (one, title) => {
    one.title = title;
    await keep(one); // what is shown is kept, also if the page is closed at once
    showList();
  },
  remove,
  isRunning: (one) => running.has(one.id),
});

showSettings();
showPresets();
bindPanels();
acceptFiles(byId("composer"));
byId("system").value = localStorage.getItem(SYSTEM) ?? "";
showModels();
const store = await openStore(changedElsewhere);
addEventListener("hashchange", openAddressed);

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  // isComposing: Enter there accepts a word of an input method.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(prompt.value);
  }
});
prompt.addEventListener("input", () => fit(prompt));
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", startNew);
byId("welcome").addEventListener("click", ({ target }) => {
  if (target.classList.contains("idea")) send(target.textContent);
});
byId("system").addEventListener("change", ({ target }) => {
  if (!chat.messages.length) localStorage.setItem(SYSTEM, target.value);
});
byId("export-all").addEventListener("click", () => exportJson([...store.chats.values()], "sapwood-chats"));
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", importFile);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !closeOverlays()) stop();
  const isCommand = event.ctrlKey || event.metaKey;
  if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    startNew();
  }
});
addEventListener("pagehide", () => {
  for (const one of store.chats.values()) if (running.has(one.id)) store.putLast(one);
});
// Until here nothing would be done with a message, so that none can be written.
prompt.disabled = false;
byId("send").disabled = false;
openAddressed();

/** Say something new at the end of the shown branch. */
function send(text) {
  if (running.has(chat.id) || (!text.trim() && !hasFiles())) return;
  if (readSettings() === null) return;
  if (!say(chat.leaf, text, takeFiles())) return;
  prompt.value = "";
  fit(prompt);
}

function say(parent, content, files) {
  if (readSettings() === null) return false;
  addMessage(chat, parent, { role: "user", content, ...(files?.length && { files }) });
  history.replaceState(null, "", `#${chat.id}`);
  ask(chat.leaf);
  return true;
}

/** Have a new answer to the message with this id. */
function ask(parent) {
  if (readSettings() === null) return;
  write(addMessage(chat, parent, { role: "assistant", model: chosenModel() }));
}

/** Write an answer, or the rest of one, into `message` of the shown chat. */
async function write(message, more = {}) {
  const settings = readSettings();
  if (settings === null) return;
  const mine = chat;
  mine.model = chosenModel();
  mine.system = byId("system").value;
  mine.updatedMs = Date.now();
  const end = more.continue_final_message ? message.id : message.parent;
  const messages = requestMessages(mine, pathOf(mine, end));
  const body = requestBody(mine.model, messages, { ...settings, ...more });
  const answer = writeAnswer(message, body, () => {
    conversation.grow(mine, message);
    if (Date.now() - keptAtMs.get(mine.id) > KEEP_EVERY_MS) keep(mine);
  });
  running.set(mine.id, { message, stop: answer.stop });
  keep(mine);
  show();
  await answer.ended;
  // What is shown as whole is kept, also if the page is closed at once. A chat that was deleted
  // meanwhile stays deleted.
  if (store.chats.has(mine.id)) await keep(mine);
  running.delete(mine.id);
  keptAtMs.delete(mine.id);
  if (mine === chat) show();
  else showList();
}

function stop() {
  running.get(chat.id)?.stop();
}

function isIdle() {
  if (running.has(chat.id)) notice("An answer is being written. Stop it first.");
  return !running.has(chat.id);
}

/** Show the chat, the list, and which button the composer has. */
function show() {
  const answering = running.get(chat.id);
  conversation.show(chat, answering?.message);
  byId("send").hidden = Boolean(answering);
  byId("stop").hidden = !answering;
  document.title = `${chat.title || "New chat"} – sapwood`;
  showList();
}

function showList() {
  list.show(store.chats.values(), chat);
  warnIfNearlyFull(store.fullness());
}

/** Show the chat that the address names, or a new one. */
function openAddressed() {
  const found = store.chats.get(location.hash.slice(1));
  if (found === chat) return;
  chat = found ?? newChat();
  byId("system").value = found ? chat.system : localStorage.getItem(SYSTEM) ?? "";
  byId("preset").value = "";
  showModels(chat.model);
  show();
  closeOverlays();
  prompt.focus();
}

function startNew() {
  if (location.hash) location.hash = "";
  else openAddressed();
  prompt.focus();
}

async function keep(one) {
  keptAtMs.set(one.id, Date.now());
  try {
    await store.put(one);
  } catch (error) {
    // Once is enough: this comes with every message.
    if (!told.has(error.message)) notice(error.message, { isError: true });
    told.add(error.message);
  }
}

async function remove(one) {
  running.get(one.id)?.stop();
  await store.delete(one.id);
  told.clear();
  if (one === chat) startNew();
  showList();
  undoDelete(one, async () => {
    await keep(one);
    location.hash = one.id;
    showList();
  });
}

function changedElsewhere(id) {
  const latest = store.chats.get(id);
  if (running.has(id)) return;
  if (id === chat.id && latest) {
    chat = latest;
    show();
  } else {
    showList();
  }
}

async function importFile({ target }) {
  const [file] = target.files;
  target.value = "";
  try {
    const chats = readChats(await file.text());
    for (const one of chats) await store.put(one);
    notice(`${chats.length} chat${chats.length === 1 ? "" : "s"} imported.`);
  } catch (error) {
    notice(`The import of ${file.name} ended: ${error.message}`, { isError: true });
  }
  showList();
}
