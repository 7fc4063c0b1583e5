// One message on the page: its text, its thinking, its figures, and what can be done with it.

import { thumbnail } from "./attachments.js";
import { button, copy, duration, element, fit } from "./dom.js";
import { markdownView } from "./markdown.js";
import { fullText } from "./tree.js";

/**
 * acts  what the buttons do: edit(message, text), regenerate(message), proceed(message), retry(message) and
 *       turnTo(message)
 * Returns {box, update}; update(state) shows the message as it is now: {isRunning, isLast, siblings}.
 */
export function messageView(message, acts) {
  const view = message.role === "user" ? userView(message, acts) : answerView(message, acts);
  const branches = branchButtons(message, acts);
  view.actions.prepend(branches.box);
  return {
    box: view.box,
    update(state) {
      branches.update(state.siblings);
      view.update(state);
    },
  };
}

function userView(message, acts) {
  const files = (message.files ?? []).map((file) => (file.image ? imageView(file) : textView(file)));
  const body = element("div", { class: "body" }, message.content);
  const actions = element("div", { class: "actions-of-message" });
  const box = element("article", { class: "message user" }, who("You"), ...files, body, actions);
  const edit = button("Edit", () => box.replaceChildren(editor(message, acts, restore)));
  actions.append(copyButton(message, body), edit);
  const parts = [...box.childNodes];
  function restore() {
    box.replaceChildren(...parts);
    edit.focus();
  }
  return { box, actions, update() {} };
}

const textView = ({ name, text }) =>
  element("details", { class: "file" }, element("summary", {}, `File ${name}`), element("pre", {}, text));

/** A thumbnail, which opens to the whole picture. */
const imageView = (file) =>
  element(
    "details",
    { class: "file" },
    element("summary", {}, ...thumbnail(file), `Image ${file.name}`),
    element("img", { class: "whole", src: file.image, alt: file.name }),
  );

function editor(message, acts, restore) {
  const area = element("textarea", { value: message.content, ariaLabel: "Edit the message", rows: 3 });
  const send = () => {
    restore();
    acts.edit(message, area.value);
  };
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      restore();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  requestAnimationFrame(() => {
    fit(area);
    area.focus();
  });
  const buttons = [button("Send", send, { class: "primary" }), button("Cancel", restore)];
  return element("div", { class: "editor" }, area, element("div", { class: "row" }, ...buttons));
}

function answerView(message, acts) {
  const thinking = thinkingView();
  const body = element("div", { class: "body" });
  const errors = element("div", {});
  const stats = element("div", { class: "stats" });
  const again = button("Regenerate", () => acts.regenerate(message));
  const proceed = button("Continue", () => acts.proceed(message));
  const actions = element("div", { class: "actions-of-message" }, copyButton(message, body), again, proceed);
  const box = element("article", { class: "message assistant" });
  box.append(who(message.model || "Model"), thinking.box, body, errors, stats, actions);
  const showText = markdownView(body);
  let shownError = null;

  function update({ isRunning, isLast }) {
    box.classList.toggle("busy", isRunning);
    // Read aloud once it is complete, not word by word.
    box.ariaBusy = String(isRunning);
    thinking.update(message, isRunning);
    showText(message.content);
    stats.textContent = statsLine(message);
    actions.hidden = isRunning;
    proceed.hidden = !isLast || !message.content || message.finish === "stop";
    const error = isRunning ? null : whyIncomplete(message);
    if (error === shownError) return;
    shownError = error;
    errors.replaceChildren(...(error ? [errorNote(error, () => acts.retry(message))] : []));
  }
  return { box, actions, update };
}

/** Open while the model thinks, folded once it answers, unless the reader has chosen. */
function thinkingView() {
  const summary = element("summary", {}, "Thinking");
  const text = element("div", { class: "thoughts" });
  const box = element("details", { class: "thinking", hidden: true }, summary, text);
  const showText = markdownView(text);
  let isChosen = false;
  let latest = "";
  summary.addEventListener("click", () => (isChosen = true));
  box.addEventListener("toggle", () => box.open && showText(latest));
  return {
    box,
    update({ reasoning, content, thinkingMs }, isRunning) {
      if (!reasoning) return;
      latest = reasoning;
      box.hidden = false;
      const isThinking = isRunning && !content;
      const took = thinkingMs ? `Thought for ${duration(thinkingMs)}` : "Thought";
      summary.textContent = isThinking ? "Thinking…" : took;
      if (!isChosen) box.open = isThinking;
      if (box.open) showText(latest);
    },
  };
}

function whyIncomplete({ error, content, reasoning, finish }) {
  if (error || content) return error;
  if (finish === "stop") return reasoning ? "The model thought, but said nothing." : "The model said nothing.";
  return reasoning ? null : "There is no answer: it was stopped before it began.";
}

function errorNote(error, retry) {
  const note = element("div", { class: "error", role: "alert" }, element("span", {}, error));
  note.append(button("Try again", retry));
  return note;
}

function branchButtons(message, acts) {
  const box = element("span", { class: "branches", hidden: true });
  return {
    box,
    update(siblings) {
      box.hidden = siblings.length < 2;
      const at = siblings.indexOf(message);
      const turn = (by) => () => acts.turnTo(siblings[at + by]);
      const before = button("‹", turn(-1), { ariaLabel: "Show the branch before" });
      const after = button("›", turn(1), { ariaLabel: "Show the next branch" });
      before.disabled = at === 0;
      after.disabled = at === siblings.length - 1;
      if (!box.hidden) box.replaceChildren(before, `${at + 1}/${siblings.length}`, after);
    },
  };
}

function copyButton(message, body) {
  return button("Copy", (event) => copy(fullText(message), body, event.currentTarget));
}

const who = (name) => element("div", { class: "who" }, name);

function statsLine({ stats = {}, finish }) {
  const { firstMs, numTokens, tokensPerS } = stats;
  const parts = [];
  if (firstMs !== undefined) parts.push(`first token ${duration(firstMs)}`);
  if (numTokens) parts.push(`${numTokens} token${numTokens === 1 ? "" : "s"}`);
  if (tokensPerS) parts.push(`${tokensPerS.toFixed(1)} tokens/s`);
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut off by the token limit");
  if (finish === "abort") parts.push("aborted by the server");
  return parts.join(" · ");
}
