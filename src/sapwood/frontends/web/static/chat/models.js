// The choice of the model, and the key that may be needed to see any.

import { apiKey, keepApiKey, listModels } from "./api.js";
import { byId, element } from "./dom.js";
import { showThinkingSettings } from "./settings.js";

const AGAIN_MS = 3000;

const select = byId("model");
let models = [];

select.addEventListener("change", mark);
byId("api-key").value = apiKey();
byId("api-key").addEventListener("change", ({ target }) => {
  keepApiKey(target.value);
  models = [];
  showModels();
});

/** The id that requests name; "" while no model is known, which asks for whatever is served. */
export const chosenModel = () => (models.length ? select.value : "");

/** Whether the chosen model takes pictures, as far as is known. */
export const seesImages = () => models.find(({ id }) => id === select.value)?.seesImages ?? true;

/** List the models, and choose `wanted` if it is among them. */
export async function showModels(wanted = "") {
  const before = chosenModel();
  try {
    if (!models.length) {
      const found = await listModels();
      models = found.models;
      byId("to-pictures").hidden = !found.canDraw;
    }
    list(models.length ? "" : "no model here can chat");
  } catch (error) {
    list(error.status === 401 ? "needs an API key: see Settings" : "not ready");
    if (error.status !== 401) setTimeout(showModels, AGAIN_MS);
  }
  const id = [wanted, before].find((one) => models.some((model) => model.id === one));
  if (id) select.value = id;
  mark();
}

function list(whyNone) {
  const options = models.map(({ id }) => element("option", { value: id }, id));
  if (whyNone) options.push(element("option", { value: "" }, whyNone));
  select.replaceChildren(...options);
}

function mark() {
  const model = models.find(({ id }) => id === select.value);
  select.title = model?.contextLength ? `Context: ${model.contextLength} tokens` : "";
  showThinkingSettings(model?.hasReasoning ?? false);
}
