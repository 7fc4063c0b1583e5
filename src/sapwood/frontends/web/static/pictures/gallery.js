// The pictures that this browser keeps: the newest ones, in a database of its own.

import { button, byId, element, notice } from "../chat/dom.js";

const MOST = 60;
const NAME = "sapwood-pictures";

/** Open the gallery and show it. `again` is called with the fields of a picture to draw anew. */
export async function openGallery(again) {
  const database = await opened();
  const shown = byId("gallery");
  const run = (mode, work) => {
    const store = database.transaction("pictures", mode).objectStore("pictures");
    return result(work(store));
  };

  async function show() {
    const all = (await run("readonly", (store) => store.getAll())).reverse();
    for (const old of all.splice(MOST)) await run("readwrite", (store) => store.delete(old.id));
    shown.replaceChildren(...all.map(item));
    byId("no-pictures").hidden = all.length > 0;
  }

  function item(picture) {
    const remove = async () => {
      await run("readwrite", (store) => store.delete(picture.id));
      await show();
    };
    const name = `${picture.seed ?? picture.id}.png`;
    return element(
      "li",
      {},
      element("img", { src: picture.url, alt: picture.fields.prompt, loading: "lazy" }),
      element("p", { title: picture.fields.prompt }, picture.fields.prompt),
      element("p", { class: "note" }, `${picture.size}, seed ${picture.seed}`),
      element(
        "div",
        { class: "row" },
        element("a", { class: "button", href: picture.url, download: name }, "Save"),
        button("Again", () => again({ ...picture.fields, seed: picture.seed })),
        button("Delete", remove, { ariaLabel: `Delete ${picture.fields.prompt}` }),
      ),
    );
  }

  await show();
  return {
    /** Keep {url, seed, size, fields}. */
    async add(picture) {
      try {
        await run("readwrite", (store) => store.add({ ...picture, createdMs: Date.now() }));
      } catch (error) {
        notice(`The picture is not kept: ${error.message}`, { isError: true });
        shown.prepend(item(picture));
        return;
      }
      await show();
    },
  };
}

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () =>
    request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return result(request);
}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
