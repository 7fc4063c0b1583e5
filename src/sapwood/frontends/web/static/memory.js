// Of the live page: who owns the memory, as a bar and as rows of a table.

import { bytes } from "./units.js";

const OWNERS = [
  ["requests", "KV of running requests", "first"],
  ["prefix_cache", "KV of the prefix cache", "second"],
  ["free", "KV, free", "rest"],
  ["weights", "weights", "third"],
];

// Of a model with several pools, what each of them holds: layers of all tokens, windows, states.
const POOLS = { full: "all tokens", window: "windows", state: "states" };

function poolRows(pools) {
  if (pools.length < 2) return [];
  return pools.map(({ name, requests, prefix_cache: cached, free }) => {
    const [kind, window] = name.split("_");
    const label = `${POOLS[kind] ?? kind}${window ? ` of ${window}` : ""}, in use and kept`;
    return memoryRow(label, requests + cached, null, requests + cached + free);
  });
}

// Of the tiers behind the KV pool: how full the host is, and what came back from where.
function tierRows(tiers) {
  if (!tiers) return [];
  const number = (value) => value.toLocaleString("en");
  const rows = [
    textRow("host tier, pages", `${number(tiers.num_host_pages)} of ${number(tiers.num_host_slots)}`),
    textRow("prompt tokens from the host", number(tiers.num_host_tokens)),
  ];
  if (!tiers.storage) return rows;
  const moved = `${bytes(tiers.bytes_written)}, ${bytes(tiers.bytes_read)}`;
  rows.push(
    textRow(`prompt tokens from the storage (${tiers.storage})`, number(tiers.num_stored_tokens)),
    textRow("storage, written and read", moved),
    textRow("storage, failures", number(tiers.num_failures)),
  );
  return rows;
}

export function showMemory({ memory, pools, tiers, resident_bytes: resident }) {
  const bar = document.getElementById("memory-bar");
  const known = OWNERS.filter(([owner]) => memory[owner] !== undefined);
  bar.replaceChildren(
    ...known.map(([owner, label, name]) => {
      const part = document.createElement("div");
      part.className = name;
      part.title = `${label}: ${bytes(memory[owner])}`;
      part.style.flexGrow = String(memory[owner]);
      return part;
    }),
  );
  bar.setAttribute("aria-label", known.map(([o, label]) => `${label} ${bytes(memory[o])}`).join(", "));
  const rows = known.map(([owner, label, name]) => memoryRow(label, memory[owner], name));
  rows.push(...poolRows(pools), ...tierRows(tiers));
  for (const [process, size] of Object.entries(resident)) {
    rows.push(memoryRow(`resident, ${process} process`, size, null));
  }
  document.getElementById("memory-rows").replaceChildren(...rows);
}

function memoryRow(label, size, name, whole = null) {
  return textRow(label, whole === null ? bytes(size) : `${bytes(size)} of ${bytes(whole)}`, name);
}

function textRow(label, text, name = null) {
  const row = document.createElement("tr");
  const title = document.createElement("td");
  if (name) {
    const key = document.createElement("span");
    key.className = `key ${name}`;
    title.append(key);
  } else {
    row.className = "process";
  }
  title.append(label);
  const value = document.createElement("td");
  value.textContent = text;
  row.append(title, value);
  return row;
}
