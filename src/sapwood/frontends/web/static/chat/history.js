// The list of chats: search, rename, export, delete.

import { button, byId, element, notice } from "./dom.js";
import { exportJson, exportMarkdown, fileName } from "./transfer.js";
import { fullText } from "./tree.js";

const CONTEXT = 30; // characters before what was searched for

/**
 * acts  open(chat), rename(chat, title), remove(chat); isRunning(chat) says whether an answer is written
 * Returns {show}: show(chats, current) draws the list.
 */
export function historyView(acts) {
  const search = byId("search");
  const list = byId("chats");
  const menu = byId("chat-menu");
  let chats = [];
  let current = null;

  search.addEventListener("input", draw);

  function draw() {
    const wanted = search.value.trim().toLowerCase();
    const found = chats.map((chat) => ({ chat, where: wanted ? find(chat, wanted) : "" }));
    const rows = found.filter(({ where }) => where !== null).map(({ chat, where }) => row(chat, where));
    const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    list.replaceChildren(...rows);
    if (focused) list.querySelector(`[data-key="${focused}"]`)?.focus();
    byId("no-chats").textContent = chats.length ? "No chat has these words." : "No chats yet.";
    byId("no-chats").hidden = rows.length > 0;
  }

  function row(chat, where) {
    const open = button(chat.title || "Untitled", () => acts.open(chat), { class: "chat-title" });
    open.dataset.key = `open-${chat.id}`;
    if (chat === current) open.ariaCurrent = "page";
    if (acts.isRunning(chat)) open.append(element("span", { class: "writing" }, " is answering"));
    if (where) open.append(element("small", {}, where));
    const more = button("⋯", () => openMenu(chat, item, more), { class: "more", ariaHasPopup: "menu" });
    more.ariaLabel = `More about ${chat.title}`;
    more.dataset.key = `more-${chat.id}`;
    const item = element("li", {}, open, more);
    return item;
  }

  function openMenu(chat, item, more) {
    const entry = (text, run) => {
      const act = () => {
        menu.hidePopover();
        run();
      };
      return button(text, act, { role: "menuitem" });
    };
    menu.replaceChildren(
      entry("Rename", () => rename(chat, item)),
      entry("Export as Markdown", () => exportMarkdown(chat)),
      entry("Export as JSON", () => exportJson([chat], fileName(chat.title))),
      entry("Delete", () => acts.remove(chat)),
    );
    menu.showPopover();
    const { left, bottom } = more.getBoundingClientRect();
    menu.style.left = `${Math.min(left, innerWidth - menu.offsetWidth - 8)}px`;
    menu.style.top = `${Math.min(bottom, innerHeight - menu.offsetHeight - 8)}px`;
    menu.firstChild.focus();
  }

  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const entries = [...menu.children];
    const at = entries.indexOf(document.activeElement) + step;
    entries[(at + entries.length) % entries.length].focus();
  });

  function rename(chat, item) {
    const input = element("input", { value: chat.title, maxLength: 100, ariaLabel: "New title" });
    const end = (title) => {
      input.onblur = null;
      acts.rename(chat, title.trim() || chat.title);
    };
    input.onblur = () => end(input.value);
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(input.value);
      if (event.key === "Escape") end(chat.title);
      if (event.key === "Escape") event.stopPropagation();
    });
    item.replaceChildren(input);
    input.select();
  }

  return {
    show(all, shown) {
      chats = [...all].sort((a, b) => b.updatedMs - a.updatedMs);
      current = shown;
      draw();
    },
  };
}

/** Words around the first place that has the text; "" if the title has it, null if nothing has. */
function find(chat, wanted) {
  if (chat.title.toLowerCase().includes(wanted)) return "";
  for (const message of chat.messages) {
    const text = fullText(message);
    const at = text.toLowerCase().indexOf(wanted);
    if (at < 0) continue;
    const from = Math.max(0, at - CONTEXT);
    return `${from ? "…" : ""}${text.slice(from, at + wanted.length + 2 * CONTEXT)}…`;
  }
  return null;
}

/** Tell how full the history is once that matters. */
export function warnIfNearlyFull(fullness) {
  const percent = Math.round(fullness * 100);
  byId("fullness").hidden = percent < 80;
  byId("fullness").textContent = `The history is ${percent}% full. Export and delete older chats.`;
}

export function undoDelete(chat, undo) {
  notice(`“${chat.title}” is deleted.`, { action: { text: "Undo", run: undo } });
}
