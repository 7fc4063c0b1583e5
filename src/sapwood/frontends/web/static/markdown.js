// A small, safe markdown: text in, DOM nodes out. No HTML is ever parsed, so an answer's markup is
// shown as the characters that it is.

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]+?)\*\*|\*(?=[^\s*])([^*\n]*[^\s*])\*/;

/** Replace the children of `target` by what `text` says. */
export function renderMarkdown(target, text) {
  target.replaceChildren(...blocks(text));
}

function blocks(text) {
  const lines = text.split("\n");
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const fence = FENCE.exec(lines[at]);
    if (fence) {
      const end = closingFence(lines, at + 1, fence[1]);
      nodes.push(codeBlock(lines.slice(at + 1, end).join("\n"), fence[2]));
      at = end + 1;
    } else if (!lines[at].trim()) {
      at += 1;
    } else if (HEADING.test(lines[at])) {
      nodes.push(inline(element("h3"), HEADING.exec(lines[at])[1]));
      at += 1;
    } else if (ITEM.test(lines[at])) {
      const end = endOf(lines, at, (line) => ITEM.test(line) || /^\s+\S/.test(line));
      nodes.push(list(lines.slice(at, end)));
      at = end;
    } else {
      const end = endOf(lines, at + 1, isParagraphLine);
      nodes.push(inline(element("p"), lines.slice(at, end).join("\n")));
      at = end;
    }
  }
  return nodes;
}

function isParagraphLine(line) {
  return line.trim() && !FENCE.test(line) && !HEADING.test(line) && !ITEM.test(line);
}

function endOf(lines, from, belongs) {
  let end = from;
  while (end < lines.length && belongs(lines[end]) && !FENCE.test(lines[end])) end += 1;
  return end;
}

/** The line of the fence that closes; one that is still being written ends with the text. */
function closingFence(lines, from, mark) {
  for (let at = from; at < lines.length; at += 1) {
    const line = lines[at].trim();
    if (line.length >= mark.length && line === mark[0].repeat(line.length)) return at;
  }
  return lines.length;
}

function list(lines) {
  const first = ITEM.exec(lines[0]);
  const node = element(first[2] ? "ol" : "ul");
  if (first[2]) node.start = Number(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item) items.push(item[3]);
    else items[items.length - 1] += `\n${line.trim()}`;
  }
  for (const text of items) node.append(inline(element("li"), text));
  return node;
}

function codeBlock(code, language) {
  const box = element("div", "code");
  const head = element("div", "code-head");
  const name = element("span");
  name.textContent = language || "text";
  const copy = element("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.dataset.action = "copy";
  head.append(name, copy);
  const pre = element("pre");
  const inner = element("code");
  inner.textContent = code;
  pre.append(inner);
  box.append(head, pre);
  return box;
}

function inline(target, text) {
  let rest = text;
  let match = INLINE.exec(rest);
  while (match) {
    if (match.index) target.append(rest.slice(0, match.index));
    if (match[2] !== undefined) {
      const code = element("code");
      code.textContent = match[2];
      target.append(code);
    } else if (match[3] !== undefined) {
      target.append(inline(element("strong"), match[3]));
    } else {
      target.append(inline(element("em"), match[4]));
    }
    rest = rest.slice(match.index + match[0].length);
    match = INLINE.exec(rest);
  }
  if (rest) target.append(rest);
  return target;
}

function element(name, className) {
  const node = document.createElement(name);
  if (className) node.className = className;
  return node;
}
