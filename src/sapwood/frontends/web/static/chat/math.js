// Formulas in markdown: $…$ and \(…\) in a line, $$…$$ and \[…\] anywhere, as models write them.
//
// Only the tokens are made here; KaTeX draws them. An opening mark without an end is text, and its end
// is looked for in so many characters or lines only, so that a text of opening marks costs no quadratic time.

const MAX_INLINE = 2_000;
const MAX_LINES = 60;

/** A plugin of markdown-it. `render` gets a formula and whether it stands alone, and returns HTML. */
export function math(markdown, render) {
  markdown.inline.ruler.before("escape", "formula", inlineRule);
  markdown.block.ruler.before("fence", "formula", blockRule, {
    alt: ["paragraph", "reference", "blockquote", "list"],
  });
  markdown.renderer.rules.formula = (tokens, i) => render(tokens[i].content, tokens[i].block);
}

function inlineRule(state, silent) {
  const found = formulaAt(state.src, state.pos, state.posMax);
  if (!found) return false;
  if (!silent) {
    const token = state.push("formula", "span", 0);
    token.content = found.content;
    token.block = found.isDisplay;
  }
  state.pos = found.end;
  return true;
}

function formulaAt(text, at, limit) {
  const two = text.slice(at, at + 2);
  if (two === "\\(") return between(text, at, limit, "\\)", false);
  if (two === "\\[") return between(text, at, limit, "\\]", true);
  if (two === "$$") return between(text, at, limit, "$$", true);
  return two[0] === "$" ? dollars(text, at, limit) : null;
}

function between(text, at, limit, close, isDisplay) {
  const end = text.slice(at + 2, Math.min(limit, at + 2 + MAX_INLINE)).indexOf(close);
  const content = end < 0 ? "" : text.slice(at + 2, at + 2 + end);
  return content.trim() ? { content, isDisplay, end: at + end + 4 } : null;
}

/** $…$ hugs its formula, and no digit follows: "$5 and $10" is money. */
function dollars(text, at, limit) {
  const rest = text.slice(at + 1, Math.min(limit, at + 1 + MAX_INLINE));
  const found = /^(?!\s)((?:[^$\\\n]|\\[^\n])+)\$(?!\d)/.exec(rest);
  if (!found || /\s$/.test(found[1])) return null;
  return { content: found[1], isDisplay: false, end: at + 1 + found[0].length };
}

/** A block begins with its opening mark, and ends with the line of its closing one. */
function blockRule(state, startLine, endLine, silent) {
  const first = lineAt(state, startLine);
  const open = first.slice(0, 2);
  if ((open !== "$$" && open !== "\\[") || state.sCount[startLine] - state.blkIndent >= 4) return false;
  const close = open === "$$" ? "$$" : "\\]";
  const last = Math.min(endLine, startLine + MAX_LINES) - 1;
  const content = [];
  for (let line = startLine; line <= last; line += 1) {
    const text = (line === startLine ? first.slice(2) : lineAt(state, line)).trimEnd();
    const end = text.indexOf(close);
    // What follows the end in its line makes it a formula in a text, which the other rule finds.
    if (end >= 0 && end !== text.length - close.length) return false;
    content.push(end < 0 ? text : text.slice(0, end));
    if (end < 0) continue;
    if (!content.join("").trim()) return false;
    if (silent) return true;
    const token = state.push("formula", "span", 0);
    token.block = true;
    token.content = content.join("\n");
    token.map = [startLine, line + 1];
    state.line = line + 1;
    return true;
  }
  return false;
}

const lineAt = (state, line) =>
  state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
