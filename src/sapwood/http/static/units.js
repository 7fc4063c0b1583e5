// Numbers as people read them.

/** Bytes, with three digits. */
export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = size > 0 ? Math.min(Math.floor(Math.log10(size) / 3), units.length - 1) : 0;
  return `${(size / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

/** A time in seconds, in the unit that fits. */
export function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

/** 0 and round steps up to at least `largest`. */
export function niceTicks(largest) {
  if (!(largest > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(largest / 2));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one * 3 >= largest);
  const ticks = [0];
  while (ticks.at(-1) < largest) ticks.push(ticks.length * step);
  return ticks;
}
