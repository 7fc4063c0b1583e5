// Text files that go along with the next message. The server takes no others, and the page says so.

import { button, byId, element, notice } from "./dom.js";

const MAX_BYTES = 256 * 1024;
const MAX_FILES = 10;
const NO_TEXT = "application/pdf, application/zip, application/msword".split(", ");

let attached = [];

/** Files come by the button, by dropping and by pasting. */
export function acceptFiles(composer) {
  const picker = byId("files");
  byId("attach").addEventListener("click", () => picker.click());
  picker.addEventListener("change", () => {
    add(picker.files);
    picker.value = "";
  });
  composer.addEventListener("dragover", (event) => event.preventDefault());
  composer.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
  composer.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    add(event.clipboardData.files);
  });
}

export const hasFiles = () => attached.length > 0;

/** The files of the message that is sent now: [{name, text}]. */
export function takeFiles() {
  const files = attached;
  attached = [];
  list();
  return files;
}

async function add(files) {
  for (const file of files) {
    try {
      if (attached.length === MAX_FILES) throw new Error(`a message takes ${MAX_FILES} files at most`);
      attached.push({ name: file.name, text: await textOf(file) });
    } catch (error) {
      notice(`${file.name} was not attached: ${error.message}.`, { isError: true });
    }
  }
  list();
  byId("prompt").focus();
}

async function textOf(file) {
  const kind = /^(image|audio|video)\//.exec(file.type)?.[1];
  if (kind) throw new Error(`the server takes text only, and this is ${kind === "image" ? "an image" : kind}`);
  if (file.size > MAX_BYTES) {
    const kilobytes = Math.ceil(file.size / 1024);
    throw new Error(`it has ${kilobytes} KB, and ${MAX_BYTES / 1024} KB is the limit`);
  }
  const noText = "it is not a text file in UTF-8; copy the text out of it";
  if (NO_TEXT.includes(file.type)) throw new Error(noText);
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(noText);
  }
  if (text.includes("\0")) throw new Error(noText);
  return text;
}

function list() {
  const chips = attached.map((file) => {
    const drop = () => {
      attached = attached.filter((one) => one !== file);
      list();
      byId("prompt").focus();
    };
    return element("li", {}, file.name, button("×", drop, { ariaLabel: `Remove ${file.name}` }));
  });
  byId("attached").replaceChildren(...chips);
  byId("attached").hidden = !chips.length;
}
