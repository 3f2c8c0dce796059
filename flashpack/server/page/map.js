// Layers x experts: a row for each layer, a cell for each expert, drawn when something has changed.
import { byId } from "./dom.js";

const FADE = 900; // milliseconds in which a cell that was used turns into one that is in memory
const still = matchMedia("(prefers-reduced-motion: reduce)");

function unpacked(text) {
  return Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
}

export class ExpertMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.state = null;
    this.glow = null; // when each expert was last used
    this.base = document.createElement("canvas");
    this.stale = this.pending = false;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** The `map` of the state. */
  show(state) {
    const { layers, experts } = state;
    this.width = Math.max(...experts, 1);
    this.stride = Math.ceil(this.width / 8);
    if (this.glow?.length !== layers.length * this.width) this.glow = new Float64Array(layers.length * this.width).fill(-1e9);
    this.state = state;
    this.resident = unpacked(state.resident);
    this.used = unpacked(state.used);
    const now = performance.now();
    for (let row = 0; row < layers.length; row++) {
      for (let e = 0; e < experts[row]; e++) if (this.bit(this.used, row, e)) this.glow[row * this.width + e] = now;
    }
    this.draw();
    if (byId("layers").open) this.table();
  }

  /** How many experts of each layer are in memory, for those who cannot see the map. */
  table() {
    const { layers, experts } = this.state ?? { layers: [], experts: [] };
    const body = byId("layers").querySelector("tbody");
    while (body.rows.length > layers.length) body.deleteRow(-1);
    layers.forEach((layer, row) => {
      let here = 0;
      for (let e = 0; e < experts[row]; e++) here += this.bit(this.resident, row, e);
      const cells = body.rows[row]?.cells ?? [0, 1, 2].map(() => (body.rows[row] ?? body.insertRow()).insertCell());
      [layer, here, experts[row]].forEach((value, i) => {
        cells[i].className = i ? "n" : "";
        if (cells[i].textContent !== String(value)) cells[i].textContent = value;
      });
    });
  }

  bit(bits, row, e) {
    return (bits[row * this.stride + (e >> 3)] >> (e & 7)) & 1;
  }

  draw(again = true) {
    this.stale ||= again;
    if (this.pending || !this.state) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      if (this.stale) this.paintBase();
      this.stale = false;
      if (this.paintUsed()) this.draw(false);
    });
  }

  /** What is in memory and what is not, and the sizes of cells. */
  paintBase() {
    const { layers, experts } = this.state;
    const ratio = devicePixelRatio || 1;
    const room = Math.floor(this.canvas.parentElement.clientWidth * ratio);
    // In device pixels, so that neither cells nor gaps are blurred. A layer that would have cells too small to see is
    // a band of several lines.
    const least = Math.ceil(2 * ratio);
    const lines = Math.ceil((this.width * least) / Math.max(room, least));
    const across = Math.ceil(this.width / lines);
    const size = Math.max(least, Math.min(Math.floor(room / across), Math.floor(24 * ratio)));
    const apart = lines > 1 ? Math.ceil(3 * ratio) : 0; // between bands
    const gap = size > 3 ? Math.max(1, Math.round(size / 8)) : 0;
    this.place = (row, e) => [
      (e % across) * size,
      row * (lines * size + apart) + Math.floor(e / across) * size,
      size - gap,
      size - gap,
    ];
    const [width, height] = [across * size, layers.length * (lines * size + apart)];
    for (const canvas of [this.canvas, this.base]) Object.assign(canvas, { width, height });
    this.canvas.style.width = `${width / ratio}px`;
    this.canvas.style.height = `${height / ratio}px`;
    const style = getComputedStyle(document.documentElement);
    const [away, here, used] = ["--away", "--here", "--used"].map((name) => style.getPropertyValue(name).trim());
    this.usedColour = used;
    const context = this.base.getContext("2d");
    experts.forEach((count, row) => {
      for (let e = 0; e < count; e++) {
        context.fillStyle = this.bit(this.resident, row, e) ? here : away;
        context.fillRect(...this.place(row, e));
      }
    });
    const row = lines > 1 ? `a band of ${lines} lines` : "a row";
    byId("map-text").textContent =
      `${this.state.in_memory.toLocaleString("en")} of ${experts.reduce((a, b) => a + b, 0).toLocaleString("en")} experts; ` +
      `${row} for each of ${layers.length} layers.`;
  }

  /** What was used, over it; whether something still fades. */
  paintUsed() {
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.base, 0, 0);
    context.fillStyle = this.usedColour;
    const now = performance.now();
    let fading = false;
    this.state.experts.forEach((count, row) => {
      for (let e = 0; e < count; e++) {
        // Without motion nothing fades: what was used keeps its colour until the next picture says otherwise.
        const since = (now - this.glow[row * this.width + e]) / FADE;
        context.globalAlpha = still.matches ? this.bit(this.used, row, e) : Math.max(0, 1 - since);
        if (!context.globalAlpha) continue;
        fading ||= !still.matches;
        context.fillRect(...this.place(row, e));
      }
    });
    return fading;
  }
}
