// The messages of the shown chat. Views are kept while the chat is shown, so that text that is selected or
// unfolded stays so.

import { byId } from "./dom.js";
import { messageView } from "./message.js";
import { pathOf, siblingsOf } from "./tree.js";

const log = byId("conversation");
/** Pixels from the end within which the reader counts as following the answer. */
const NEAR_END = 80;

/** acts: see messageView. Returns {show, grow}. */
export function conversationView(acts) {
  let views = new Map(); // by id of the message
  let shownChat = null;
  let frame = 0; // in which a growing answer will be drawn
  let notBefore = 0;

  /** Draw the chat as it is; running: the message that is being written, or undefined. */
  function show(chat, running) {
    cancelAnimationFrame(frame);
    frame = 0;
    const follow = chat !== shownChat || isAtEnd();
    if (chat !== shownChat) views = new Map();
    shownChat = chat;
    const path = pathOf(chat);
    const kept = new Map();
    for (const message of path) kept.set(message.id, views.get(message.id) ?? messageView(message, acts));
    views = kept;
    arrange(path.map((message) => views.get(message.id).box));
    for (const message of path) {
      views.get(message.id).update({
        isRunning: message === running,
        isLast: message === path.at(-1),
        siblings: siblingsOf(chat, message),
      });
    }
    byId("welcome").hidden = path.length > 0;
    if (follow) log.scrollTop = log.scrollHeight;
  }

  /** Show the boxes in this order, and touch only those that are not in their places. */
  function arrange(boxes) {
    const wanted = new Set(boxes);
    for (const box of log.querySelectorAll(":scope > .message")) if (!wanted.has(box)) box.remove();
    let at = byId("welcome");
    for (const box of boxes) {
      if (at.nextElementSibling !== box) at.after(box);
      at = box;
    }
  }

  /** Draw a growing answer soon: once per frame at most, and for a quarter of the time at most. */
  function grow(chat, running) {
    if (chat === shownChat) frame ||= requestAnimationFrame(draw);

    function draw() {
      const start = performance.now();
      if (start < notBefore) {
        frame = requestAnimationFrame(draw);
        return;
      }
      frame = 0;
      const follow = isAtEnd();
      const isLast = chat.leaf === running.id;
      views.get(running.id)?.update({ isRunning: true, isLast, siblings: siblingsOf(chat, running) });
      if (follow) log.scrollTop = log.scrollHeight;
      const end = performance.now();
      notBefore = end + 3 * (end - start);
    }
  }

  return { show, grow };
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
