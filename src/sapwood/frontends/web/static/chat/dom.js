// Small functions over the page's nodes.

const NOTICE_MS = 8000;

export const byId = (id) => document.getElementById(id);

/** A new node with these properties and children; `class` and `data` are the attributes of that name. */
export function element(name, { class: className, data, ...properties } = {}, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  Object.assign(node.dataset, data);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

/** A button that submits nothing. */
export function button(text, onclick, properties = {}) {
  return element("button", { type: "button", onclick, ...properties }, text);
}

/** Tell the user something for a while; screen readers read it aloud. `action` is {text, run}. */
export function notice(text, { action, isError = false } = {}) {
  const box = element("div", { class: isError ? "notice failed" : "notice" }, text);
  const close = () => box.remove();
  if (action) {
    const run = () => {
      close();
      action.run();
    };
    box.append(button(action.text, run));
  }
  box.append(button("×", close, { ariaLabel: "Close this message" }));
  byId("notices").append(box);
  if (!isError) setTimeout(close, NOTICE_MS);
}

/** Copy a text, or select `node` where the browser forbids that, which it does without HTTPS. */
export async function copy(text, node, pressed) {
  const before = pressed.textContent;
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(node);
    done = "Selected: press Ctrl+C";
  }
  pressed.textContent = done;
  pressed.addEventListener("blur", () => (pressed.textContent = before), { once: true });
  setTimeout(() => (pressed.textContent = before), NOTICE_MS / 4);
}

/** Give a text area the height of its text; CSS bounds it. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 0)} s`;
}
