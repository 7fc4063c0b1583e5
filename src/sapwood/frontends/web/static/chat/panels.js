// The panels beside the conversation, which cover it on narrow screens, and the colours.

import { byId } from "./dom.js";

const WIDE = matchMedia("(min-width: 70rem)");
const PANELS = [
  ["history", "toggle-history"],
  ["settings", "toggle-settings"],
];

export function bindPanels() {
  for (const [panel, toggle] of PANELS) {
    byId(toggle).addEventListener("click", () => {
      const isOpening = byId(panel).hidden;
      if (isOpening && !WIDE.matches) closeOverlays();
      setOpen(panel, toggle, isOpening);
      if (isOpening) byId(panel).querySelector("input, select, textarea")?.focus();
    });
    setOpen(panel, toggle, WIDE.matches);
    WIDE.addEventListener("change", () => setOpen(panel, toggle, WIDE.matches));
  }
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault();
      setOpen("history", "toggle-history", true);
      byId("search").focus();
    }
  });
  const theme = byId("theme");
  theme.value = document.documentElement.dataset.theme ?? "";
  theme.addEventListener("change", () => {
    localStorage.setItem("sapwood-theme", theme.value);
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
  });
}

/** Close what covers the conversation; false if nothing did. */
export function closeOverlays() {
  // The browser closes a menu at Escape by itself.
  if (document.querySelector(":popover-open")) return true;
  if (WIDE.matches) return false;
  const open = PANELS.filter(([panel]) => !byId(panel).hidden);
  for (const [panel, toggle] of open) {
    setOpen(panel, toggle, false);
    byId(toggle).focus();
  }
  return open.length > 0;
}

function setOpen(panel, toggle, isOpen) {
  byId(panel).hidden = !isOpen;
  byId(toggle).ariaExpanded = String(isOpen);
}
