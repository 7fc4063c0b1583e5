// What the chat page uses of other projects: bundled into one module by build.mjs.

export { default as DOMPurify } from "dompurify";
export { default as highlighter } from "highlight.js/lib/common";
export { default as katex } from "katex";
export { default as MarkdownIt } from "markdown-it";
