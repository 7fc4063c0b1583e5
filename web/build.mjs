// Bundles the libraries of the chat page into a folder, with KaTeX's fonts and all licences.
//
//   node build.mjs [FOLDER]     default: where the package serves them from
//
// The same lock file gives the same bytes on every machine; a test compares them with what is committed.

import { readFile, readdir, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";
import esbuild from "esbuild";

const here = path.dirname(fileURLToPath(import.meta.url));
const served = path.join(here, "../src/sapwood/frontends/web/static/libraries");
const folder = path.resolve(process.argv[2] ?? served);

/** Browsers that can show the page know woff2, so the other two formats of each font are left out. */
const onlyWoff2 = {
  name: "only-woff2",
  setup(build) {
    build.onLoad({ filter: /katex\.css$/ }, async ({ path: file }) => {
      const css = await readFile(file, "utf8");
      const contents = css.replace(/,\s*url\([^)]*\)\s*format\(["'](?:woff|truetype)["']\)/g, "");
      return { contents, loader: "css" };
    });
  },
};

await rm(folder, { recursive: true, force: true });
const { metafile } = await esbuild.build({
  absWorkingDir: here,
  entryPoints: { libraries: "libraries.js", katex: "node_modules/katex/dist/katex.css" },
  outdir: folder,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
  legalComments: "none", // they are in LICENSES.txt
  assetNames: "fonts/[name]",
  loader: { ".woff2": "file" },
  plugins: [onlyWoff2],
  metafile: true,
});
await writeFile(path.join(folder, "LICENSES.txt"), await licences(Object.keys(metafile.inputs)));

/** The licences of every package of which a file is in the bundle, and of the fonts. */
async function licences(inputs) {
  const packages = new Set();
  for (const input of inputs) {
    const name = /^node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input)?.[1];
    if (name) packages.add(name);
  }
  const parts = [];
  for (const name of [...packages].sort()) {
    const home = path.join(here, "node_modules", name);
    const { version, license } = JSON.parse(await readFile(path.join(home, "package.json"), "utf8"));
    const file = (await readdir(home)).find((one) => /^licen[cs]e/i.test(one));
    if (!file) throw new Error(`${name} has no licence file`);
    parts.push([`${name} ${version}: ${license.replace(/[()]/g, "")}`, await readFile(path.join(home, file), "utf8")]);
  }
  const fonts = await readFile(path.join(here, "licenses/katex-fonts.txt"), "utf8");
  parts.push(["The fonts of KaTeX: OFL-1.1", fonts]);
  const line = "=".repeat(80);
  const text = parts.map(([title, words]) => `${line}\n${title}\n${line}\n\n${words.trim()}\n`).join("\n");
  return text.replace(/\r\n/g, "\n").replace(/[ \t]+$/gm, "");
}
