// Markdown to nodes. The text is a model's, so it may be hostile: HTML in it is text, what becomes of it
// goes through DOMPurify, no image is loaded, and links lead to other servers only.

import { DOMPurify, MarkdownIt, highlighter, katex } from "../libraries/libraries.js";
import { button, copy, element } from "./dom.js";
import { math } from "./math.js";

/** Above these numbers of characters a text is not formatted, and code is not coloured. */
const MAX_TEXT = 200_000;
const MAX_CODE = 40_000;

/** What markdown-it and highlight.js write, and nothing else. */
const ALLOWED = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class", "data-language", "data-formula", "data-display"],
  ADD_URI_SAFE_ATTR: ["data-language", "data-formula"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
const { escapeHtml } = markdown.utils;
math(markdown, (formula, isDisplay) => {
  const display = isDisplay ? ' data-display="true"' : "";
  return `<span data-formula="${escapeHtml(formula)}"${display}></span>`;
});
markdown.renderer.rules.image = (tokens, i) => {
  const [address, name] = [tokens[i].attrGet("src"), tokens[i].content || "without a name"];
  return `<a href="${escapeHtml(address)}">Image: ${escapeHtml(name)}</a>`;
};
markdown.renderer.rules.fence = (tokens, i) => {
  const language = tokens[i].info.trim().split(/\s+/)[0];
  return `<pre data-language="${escapeHtml(language)}"><code>${escapeHtml(tokens[i].content)}</code></pre>`;
};
markdown.core.ruler.push("fit-the-page", ({ tokens }) => {
  for (const token of tokens) {
    // The page has headings of its own above these.
    if (token.type.startsWith("heading")) token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`;
    // The page's policy allows no style attributes.
    const side = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
    if (side) token.attrs = [["align", side[1]]];
  }
});

/** Keeps `target` showing a text that grows: only what has changed is made anew. */
export function markdownView(target) {
  let shown = []; // {html, nodes} of each block
  return (text) => {
    const blocks = text.length > MAX_TEXT ? [null] : htmlBlocks(text);
    let same = 0;
    while (same < blocks.length && blocks[same] !== null && shown[same]?.html === blocks[same]) same += 1;
    for (const { nodes } of shown.slice(same)) for (const node of nodes) node.remove();
    const added = blocks.slice(same).map((html) => ({ html, nodes: nodesOf(html ?? "", text) }));
    shown = [...shown.slice(0, same), ...added];
    for (const { nodes } of added) target.append(...nodes);
  };

  function nodesOf(html, text) {
    if (!html) return text.length > MAX_TEXT ? [element("p", { class: "plain" }, text)] : [];
    const fragment = DOMPurify.sanitize(html, ALLOWED);
    for (const link of fragment.querySelectorAll("a")) checkLink(link);
    for (const span of fragment.querySelectorAll("[data-formula]")) drawFormula(span);
    for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBox(pre));
    for (const table of fragment.querySelectorAll("table")) makeScrollable(table);
    return [...fragment.childNodes];
  }
}

/** The HTML of each block of the top level. */
function htmlBlocks(text) {
  const env = {};
  const blocks = [];
  let tokens = [];
  let depth = 0;
  for (const token of markdown.parse(text, env)) {
    tokens.push(token);
    depth += token.nesting;
    if (depth > 0) continue;
    blocks.push(markdown.renderer.render(tokens, markdown.options, env));
    tokens = [];
  }
  return blocks;
}

/** A link to this server could call one of its routes in the reader's name, so it becomes text. */
function checkLink(link) {
  let url = null;
  try {
    url = new URL(link.getAttribute("href") ?? "", location.href);
  } catch {
    // It leads nowhere.
  }
  if (url?.protocol === "mailto:" || (/^https?:$/.test(url?.protocol) && url.origin !== location.origin)) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = url.href;
  } else {
    const address = link.getAttribute("href");
    const isShown = !address || link.textContent === address;
    link.replaceWith(...link.childNodes, ...(isShown ? [] : [` (${address})`]));
  }
}

function drawFormula(span) {
  const { formula, display } = span.dataset;
  try {
    // katex.render makes nodes whose styles are set one by one, which the page's policy allows.
    katex.render(formula, span, { displayMode: Boolean(display), maxSize: 20, maxExpand: 200, trust: false });
    span.className = display ? "formula display" : "formula";
  } catch {
    // Not TeX that KaTeX knows, or not complete yet: the reader gets the source.
    span.replaceChildren(element("code", {}, formula));
  }
  delete span.dataset.formula;
}

function codeBox(pre) {
  const language = pre.dataset.language ?? "";
  const code = element("code", {}, pre.textContent.replace(/\n$/, ""));
  const text = code.textContent;
  if (highlighter.getLanguage(language) && text.length <= MAX_CODE) {
    const { value } = highlighter.highlight(text, { language, ignoreIllegals: true });
    code.replaceChildren(DOMPurify.sanitize(value, ALLOWED));
  }
  const press = (event) => copy(text, code, event.currentTarget);
  const head = element("div", { class: "code-head" }, element("span", {}, language || "text"));
  head.append(button("Copy", press, { ariaLabel: "Copy this code" }));
  const area = element("pre", { tabIndex: 0, ariaLabel: `Code: ${language || "text"}` }, code);
  return element("div", { class: "code" }, head, area);
}

/** A wide table scrolls by itself, also with the keyboard. */
function makeScrollable(table) {
  const box = element("div", { class: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
  table.replaceWith(box);
  box.append(table);
}
