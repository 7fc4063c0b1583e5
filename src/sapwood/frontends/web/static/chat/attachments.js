// Text files and pictures that go along with the next message. The page says why others do not.

import { button, byId, element, notice } from "./dom.js";
import { seesImages } from "./models.js";

const MAX_BYTES = 256 * 1024;
const MAX_FILES = 10;
const MAX_IMAGE_BYTES = 50 * 1024 * 1024;
/** A picture with a longer side, or a larger file, is drawn anew: the history has not much room. */
const MAX_SIDE = 1600;
const KEPT_BYTES = 1024 * 1024;
const AS_IT_IS = "image/png, image/jpeg, image/webp, image/gif".split(", ");
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

/** The files of the message that is sent now: [{name, text}], and [{name, image}] with a data URL. */
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
      const isImage = file.type.startsWith("image/");
      attached.push({ name: file.name, ...(isImage ? { image: await imageOf(file) } : { text: await textOf(file) }) });
    } catch (error) {
      notice(`${file.name} was not attached: ${error.message}.`, { isError: true });
    }
  }
  list();
  byId("prompt").focus();
}

/** The picture as a data URL, small enough to be kept. */
async function imageOf(file) {
  if (!seesImages()) throw new Error("this model takes text only, and this is an image");
  if (file.size > MAX_IMAGE_BYTES) throw new Error(`${MAX_IMAGE_BYTES / 1024 / 1024} MB is the limit of an image`);
  let drawn;
  try {
    drawn = await createImageBitmap(file);
  } catch {
    throw new Error("it is no image that this browser can read");
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(drawn.width, drawn.height));
  if (scale === 1 && file.size <= KEPT_BYTES && AS_IT_IS.includes(file.type)) return dataUrl(file);
  const size = [drawn.width, drawn.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = new OffscreenCanvas(...size);
  const paper = canvas.getContext("2d");
  paper.fillStyle = "white"; // as the server has it where a picture is transparent
  paper.fillRect(0, 0, ...size);
  paper.drawImage(drawn, 0, 0, ...size);
  return dataUrl(await canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 }));
}

const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

async function textOf(file) {
  const kind = /^(audio|video)\//.exec(file.type)?.[1];
  if (kind) throw new Error(`this page takes text and images, and this is ${kind}`);
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
    return element("li", {}, ...thumbnail(file), file.name, button("×", drop, { ariaLabel: `Remove ${file.name}` }));
  });
  byId("attached").replaceChildren(...chips);
  byId("attached").hidden = !chips.length;
}

/** A small view of a picture; nothing for a text. */
export const thumbnail = ({ name, image }) =>
  image ? [element("img", { class: "thumbnail", src: image, alt: name })] : [];
