// Draws what the page's own data holds. Every text goes through textContent; nothing is fetched,
// except by a live page, from the server that it came from.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let data, figures, charts = [];

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, text = "") => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  };
  const short = (x) => {
    if (x === null || x === undefined || Number.isNaN(x)) return "–";
    if (x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5)) return String(+x.toPrecision(3));
    return x.toExponential(1).replace(".0e", "e").replace("e+", "e");
  };

  // --- numbers ------------------------------------------------------------------------------

  async function unpack() {
    data = JSON.parse(document.getElementById("data").textContent);
    const text = document.getElementById("figures").textContent;
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const kinds = { u1: Uint8Array, u2: Uint16Array, f4: Float32Array };
    figures = data.figures.map(([offset, kind, length]) => new kinds[kind](buffer, offset, length));
  }
  // Two bytes on a log scale: 0 is nothing, 1 is zero.
  const decode = (codes) => Array.from(codes, (c) => (c === 0 ? null : c === 1 ? 0 : 2 ** (((c - 2) / 65533) * 320 - 160)));
  const plain = (values) => Array.from(values, (x) => (Number.isFinite(x) ? x : null));

  // --- sparklines ---------------------------------------------------------------------------

  function spark(box, values, log) {
    const shown = values.map((x) => (x === null || (log && x <= 0) ? null : log ? Math.log(x) : x));
    const known = shown.filter((x) => x !== null);
    if (known.length < 2) return;
    let low = Math.min(...known), high = Math.max(...known);
    const least = log ? 0.2 : Math.abs(high) * 1e-3 || 1e-9; // a constant is a line, not noise
    if (high - low < least) { const middle = (low + high) / 2; low = middle - least / 2; high = middle + least / 2; }
    const every = Math.max(1, Math.floor(shown.length / 80));
    let path = "", pen = "M";
    for (let i = 0; i < shown.length; i += every) {
      if (shown[i] === null) { pen = "M"; continue; }
      path += `${pen}${((i / (shown.length - 1)) * 100).toFixed(1)} ${(18 - ((shown[i] - low) / (high - low)) * 16).toFixed(1)}`;
      pen = "L";
    }
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", path);
    svg.append(line);
    box.replaceChildren(svg);
  }

  // --- line charts --------------------------------------------------------------------------

  const dashes = [[], [6, 4], [2, 3], [8, 3, 2, 3]];
  function lines(box, series, { log = false, height = 176, band = null } = {}) {
    const steps = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
    const at = new Map(steps.map((step, i) => [step, i]));
    const columns = series.map((s) => {
      const column = new Array(steps.length).fill(undefined); // undefined is spanned, null is a gap
      s.x.forEach((step, i) => { column[at.get(step)] = log && s.y[i] <= 0 ? null : s.y[i]; });
      return column;
    });
    const soft = css("--soft"), line = css("--line"), font = `11px ${css("--sans")}`;
    const axis = { stroke: soft, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    const known = columns.flat().filter((y) => y !== null && y !== undefined);
    const [low, high] = log && known.length ? [Math.log10(Math.min(...known)), Math.log10(Math.max(...known))] : [0, 0];
    const range = log ? () => [10 ** Math.floor(low - 0.05), 10 ** Math.ceil(high + 0.05)] : room;
    const tell = legend(box, series);
    const chart = new uPlot({
      width: box.clientWidth || 300, height,
      padding: [8, Math.max(16, 6 + 3.4 * count(steps.at(-1) ?? 0).length), 0, 0], // half of the last label
      scales: { x: { time: false }, y: log ? { distr: 3, range } : { range } },
      axes: [
        { ...axis, space: 70, size: 26, gap: 4, values: (_, ticks) => ticks.map(count) },
        { ...axis, size: 50, gap: 6, splits: log ? () => decades(low, high) : undefined, filter: (_, ticks) => ticks, values: (_, ticks) => ticks.map(short) },
      ],
      series: [{}].concat(series.map((s, i) => ({
        label: s.label, stroke: css(`--series-${i % 4}`), dash: dashes[i % 4], width: 1.6, spanGaps: true, points: { show: steps.length < 2 },
      }))),
      legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      hooks: {
        drawClear: band ? [(u) => shade(u, band)] : [],
        setCursor: [(u) => tell(u.cursor.idx === null ? null : steps[u.cursor.idx], columns.map((c) => c[u.cursor.idx]))],
      },
    }, [steps, ...columns], box);
    const last = series.map((s) => `${s.label}: ${short(s.y.filter((y) => y !== null).at(-1))} at the end`);
    chart.root.setAttribute("role", "img");
    chart.root.setAttribute("aria-label", last.join("; "));
    charts.push({ chart, box });
  }
  // Between values that differ by rounding alone, such as a clipped norm, uPlot finds no place for a tick.
  function room(_, low, high) {
    const size = Math.max(Math.abs(low), Math.abs(high));
    if (high - low > 1e-5 * size) return uPlot.rangeNum(low, high, 0.1, true);
    return [low - (0.1 * size || 1), high + (0.1 * size || 1)];
  }
  function count(number) {
    return number.toLocaleString("en").replaceAll(",", " "); // as the facts at the top
  }
  function decades(low, high) {
    const first = Math.floor(low - 0.05), last = Math.ceil(high + 0.05), pitch = Math.ceil((last - first) / 6);
    return Array.from({ length: Math.floor((last - first) / pitch) + 1 }, (_, i) => 10 ** (first + i * pitch));
  }
  // The legend stands in the caption; it shows the last values, or those under the pointer.
  function legend(box, series) {
    const caption = box.closest("figure").querySelector("figcaption");
    caption.querySelector(".legend")?.remove();
    const node = make("span", { class: "legend", "aria-hidden": "true" }), step = make("span"), values = [];
    node.append(step);
    series.forEach((s, i) => {
      const item = make("span"), value = make("b");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
      for (const [key, to] of Object.entries({ x1: 0, x2: 18, y1: 2, y2: 2, "stroke-width": 2, "stroke-dasharray": dashes[i % 4].join(" ") })) mark.setAttribute(key, to);
      mark.style.stroke = `var(--series-${i % 4})`;
      svg.append(mark);
      if (series.length > 1) item.append(svg, make("span", {}, s.label));
      item.append(value);
      values.push(value);
      node.append(item);
    });
    caption.append(node);
    const tell = (at, now) => {
      step.textContent = at === null ? "" : `step ${at}`;
      series.forEach((s, i) => { values[i].textContent = short(at === null ? s.y.filter((y) => y !== null).at(-1) : now[i]); });
    };
    tell(null, []);
    return tell;
  }
  function shade(u, [low, high]) {
    const top = Math.max(u.valToPos(high, "y", true), u.bbox.top);
    const bottom = Math.min(u.valToPos(low, "y", true), u.bbox.top + u.bbox.height);
    if (!(bottom > top)) return;
    u.ctx.save();
    u.ctx.globalAlpha = 0.09;
    u.ctx.fillStyle = css("--good");
    u.ctx.fillRect(u.bbox.left, top, u.bbox.width, bottom - top);
    u.ctx.restore();
  }

  // --- colours ------------------------------------------------------------------------------

  const cache = new Map();
  function ramp(name) {
    const key = `${name}${dark.matches}`;
    if (!cache.has(key)) {
      const stops = [0, 1, 2, 3, 4].map((i) => css(`--${name}-${i}`)).map((c) => [1, 3, 5].map((at) => parseInt(c.slice(at, at + 2), 16)));
      cache.set(key, Array.from({ length: 256 }, (_, v) => {
        const t = (v / 255) * 4, i = Math.min(3, Math.floor(t));
        return stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (t - i)));
      }));
    }
    return cache.get(key);
  }
  // Codes 0..255, or -1 for nothing, as an image of one pixel a cell.
  function cells(width, height, code, name) {
    const colours = ramp(name), canvas = make("canvas");
    [canvas.width, canvas.height] = [width, height];
    const image = new ImageData(width, height);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      const v = code(x, y), i = 4 * (y * width + x);
      if (v < 0) continue;
      [image.data[i], image.data[i + 1], image.data[i + 2]] = colours[v];
      image.data[i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
  function prepare(canvas) {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.imageSmoothingEnabled = false;
    pen.clearRect(0, 0, width, height);
    pen.font = `11px ${css("--sans")}`;
    return [pen, width, height];
  }

  // --- magnitudes over time -----------------------------------------------------------------

  const limits = [[-9, "fp8 e4m3: smallest"], [-14, "fp16: normal from here"], [-24, "fp16: smallest"], [-126, "bf16, fp32: normal from here"], [16, "fp16: largest"]];
  function heat(canvas, [low, high, at], steps, title) {
    const rows = high - low + 3, times = steps.length;
    const share = (row, x) => figures[at][row * times + x]; // 0 for none, 1..40 in half doublings
    const shade = (row, x) => (share(row, x) ? Math.round((share(row, x) / 40) * 255) : -1);
    const left = 46, bottom = 20, top = 6, gap = 5, line = 11;
    const [pen, width, height] = prepare(canvas);
    const inner = height - top - bottom - 2 * (gap + line), wide = width - left;
    const picture = cells(times, rows - 2, (x, y) => shade(rows - 2 - y, x), "heat");
    pen.fillStyle = css("--heat-0");
    pen.fillRect(left, top, wide, line);
    pen.fillRect(left, top + line + gap, wide, inner);
    pen.fillRect(left, height - bottom - line, wide, line);
    pen.drawImage(cells(times, 1, (x) => shade(rows - 1, x), "ratio"), left, top, wide, line);
    pen.drawImage(picture, left, top + line + gap, wide, inner);
    pen.drawImage(cells(times, 1, (x) => shade(0, x), "heat"), left, height - bottom - line, wide, line);
    pen.fillStyle = css("--soft");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText("NaN, ∞", left - 6, top + line / 2);
    pen.fillText("0", left - 6, height - bottom - line / 2);
    const place = (k) => top + line + gap + ((high + 1 - k) / (high - low + 1)) * inner;
    const pitch = Math.max(1, Math.ceil(26 / (inner / (high - low + 1))));
    for (let k = Math.ceil(low / pitch) * pitch; k <= high; k += pitch) pen.fillText(`2${sup(k)}`, left - 6, place(k));
    pen.textBaseline = "top";
    pen.textAlign = "left";
    pen.fillText(`step ${steps[0]}`, left, height - bottom + 6);
    pen.textAlign = "right";
    pen.fillText(String(steps.at(-1)), width, height - bottom + 6);
    for (const [k, name] of limits) {
      if (k <= low || k > high) continue;
      pen.setLineDash([4, 3]);
      pen.strokeStyle = css("--error");
      pen.beginPath();
      pen.moveTo(left, place(k));
      pen.lineTo(width, place(k));
      pen.stroke();
      pen.setLineDash([]);
      const text = pen.measureText(name).width;
      pen.fillStyle = css("--panel");
      pen.globalAlpha = 0.8;
      pen.fillRect(width - text - 8, place(k) - 15, text + 8, 14);
      pen.globalAlpha = 1;
      pen.fillStyle = css("--error");
      pen.textBaseline = "bottom";
      pen.fillText(name, width - 4, place(k) - 2);
      pen.textBaseline = "top";
    }
    const means = [];
    for (const x of [0, times - 1]) {
      let best = 0, k = low;
      for (let y = low; y <= high; y++) if (share(1 + y - low, x) > best) [best, k] = [share(1 + y - low, x), y];
      means.push(k);
    }
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title}: sizes between 2 to the ${low} and 2 to the ${high + 1}; most are near 2 to the ${means[0]} at first and 2 to the ${means[1]} at the end`);
  }
  const sup = (n) => String(n).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

  // --- the parameters -----------------------------------------------------------------------

  const shade255 = (ratio) => (ratio === null || ratio === undefined ? -1 : ratio <= 0 ? 0 : Math.max(0, Math.min(255, Math.round(((Math.log10(ratio) + 6) / 6) * 255))));
  function fingerprint() {
    const canvas = document.querySelector(".fingerprint canvas");
    if (!canvas || !data.index.lines) return;
    const steps = plain(figures[data.index.steps]);
    const rows = data.index.lines.map((l) => (l.ratio === undefined ? null : decode(figures[l.ratio])));
    const tall = Math.max(60, Math.min(300, rows.length * 7));
    canvas.style.height = `${tall}px`;
    const [pen, width, height] = prepare(canvas);
    pen.fillStyle = css("--panel");
    pen.fillRect(0, 0, width, height);
    pen.drawImage(cells(steps.length, rows.length, (x, y) => (rows[y] ? shade255(rows[y][x]) : -1), "ratio"), 0, 0, width, height);
    const readout = document.querySelector(".fingerprint .readout"), standing = readout.textContent;
    canvas.onmousemove = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = Math.min(steps.length - 1, Math.floor(((event.clientX - box.left) / box.width) * steps.length));
      const y = Math.min(rows.length - 1, Math.floor(((event.clientY - box.top) / box.height) * rows.length));
      if (x >= 0 && y >= 0) readout.textContent = `${data.names[y]} at step ${steps[x]}: ${rows[y] ? short(rows[y][x]) : "no update"}`;
    };
    canvas.onmouseleave = () => { readout.textContent = standing; };
    canvas.onclick = (event) => {
      const box = canvas.getBoundingClientRect();
      const y = Math.min(rows.length - 1, Math.floor(((event.clientY - box.top) / box.height) * rows.length));
      const row = document.querySelector(`tr[data-row="${y}"]`);
      open(row, true);
      row.scrollIntoView({ block: "center" });
    };
  }
  function open(row, wanted) {
    const button = row.querySelector(".open"), detail = row.nextElementSibling;
    const opened = wanted ?? button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(opened));
    detail.hidden = !opened || row.hidden;
    if (opened) history.replaceState(null, "", `#parameter=${encodeURIComponent(row.dataset.name)}`);
    if (opened) plots(detail.querySelector(".plots"), Number(row.dataset.row));
  }
  function plots(box, number) {
    charts = charts.filter((c) => !box.contains(c.box) || (c.chart.destroy(), false));
    box.replaceChildren();
    if (!data.index.lines) return;
    const told = data.index.lines[number], x = plain(figures[data.index.steps]);
    const later = []; // drawn when all are in place and have their widths
    const figure = (title, node) => {
      const whole = make("figure");
      whole.append(make("figcaption", {}, title), node);
      box.append(whole);
      return node;
    };
    const draw = (title, names, options) => {
      const shown = names.filter((name) => told[name] !== undefined).map((name) => ({ label: name, x, y: decode(figures[told[name]]) }));
      if (!shown.some((line) => line.y.some((y) => y > 0))) return;
      const plot = figure(title, make("div"));
      later.push(() => lines(plot, shown, { height: 170, ...options }));
    };
    draw("norms", ["weight", "gradient", "update"], { log: true });
    draw("update ratio, with the usual band", ["ratio"], { log: true, band: [1e-4, 1e-2] });
    draw("updates lost to rounding", ["lost"]);
    draw("distance from its set", ["defect"]);
    const steps = plain(figures[data.index.heatSteps]);
    for (const [quantity, chart] of Object.entries(data.index.heat[number])) {
      const title = `size of the ${quantity}s, log₂|x|`;
      const canvas = figure(title, make("canvas"));
      later.push(() => heat(canvas, chart, steps, title));
    }
    for (const task of later) task();
  }
  function table() {
    const body = document.querySelector("#parameters tbody");
    if (!body) return;
    const pairs = all("tr[data-row]", body).map((row) => [row, row.nextElementSibling]);
    for (const [row] of pairs) {
      const told = data.index.lines?.[Number(row.dataset.row)];
      row.querySelector(".open").onclick = () => open(row);
      for (const box of all(".spark", row)) {
        if (told?.[box.dataset.line] !== undefined) spark(box, decode(figures[told[box.dataset.line]]), true);
      }
    }
    const form = document.querySelector(".filter"), count = form.querySelector("output");
    const filter = () => {
      const text = form.elements.name.value.toLowerCase();
      let shown = 0;
      for (const [row, detail] of pairs) {
        row.hidden = !row.dataset.name.toLowerCase().includes(text) || (form.elements.wrong.checked && !row.className);
        detail.hidden = row.hidden || row.querySelector(".open").getAttribute("aria-expanded") !== "true";
        shown += !row.hidden;
      }
      count.textContent = shown === pairs.length ? `${shown} parameters` : `${shown} of ${pairs.length} parameters`;
    };
    form.oninput = filter;
    form.onsubmit = (event) => event.preventDefault();
    filter();
    for (const button of all("#parameters thead button")) button.onclick = () => {
      const head = button.parentElement, key = button.dataset.sort;
      const down = head.getAttribute("aria-sort") !== "descending" && key !== "name" && key !== "kind" || head.getAttribute("aria-sort") === "ascending";
      for (const other of all("th[aria-sort]", head.parentElement)) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = ([row]) => (key === "name" || key === "kind" ? row.dataset[key] : row.dataset[key] === "" ? -Infinity : Number(row.dataset[key]));
      const sign = down ? -1 : 1;
      pairs.sort((a, b) => { const [u, v] = [value(a), value(b)]; return sign * (u < v ? -1 : u > v ? 1 : 0); });
      for (const pair of pairs) body.append(...pair);
    };
  }

  // --- pictures -----------------------------------------------------------------------------

  // What a picture is a sample of, where it is one.
  const sampled = ({ shape, whole }) => (shape[0] === whole[0] && shape[1] === whole[1] ? "" : ` of ${whole[0]} × ${whole[1]}`);
  function matrix(box, picture) {
    const values = figures[picture.data], [height, width] = picture.shape;
    const span = picture.high - picture.low || 1;
    const side = Math.max(width, height), room = side > 32 ? 200 : 340; // many cells: a texture, nothing to read
    const size = Math.max(2, Math.min(22, Math.floor(room / side)));
    const signed = picture.low < 0 && picture.high > 0, most = Math.max(-picture.low, picture.high) || 1;
    const exact = (v) => (picture.exact ? v : picture.low + (v / 255) * span);
    const code = (x, y) => { const v = exact(values[y * width + x]); return signed ? Math.round(127.5 + (v / most) * 127.5) : Math.round(((v - picture.low) / span) * 255); };
    const canvas = cells(width, height, code, signed ? "ratio" : "heat");
    canvas.style.width = `${width * size}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${picture.title}, ${height} by ${width}${sampled(picture)}, from ${short(picture.low)} to ${short(picture.high)}`);
    if (picture.exact && width * height <= 64) return box.append(grid(picture, values, code, signed ? "ratio" : "heat", short));
    box.append(canvas, make("p", { class: "at" }, `${height} × ${width}${sampled(picture)}, from ${short(picture.low)} to ${short(picture.high)}`));
  }
  function grid(picture, values, code, name, text) {
    const [height, width] = picture.shape, colours = ramp(name), node = make("table", { class: picture.form });
    const body = make("tbody"), names = picture.labels;
    node.append(make("caption", { class: "unseen" }, picture.title), body);
    for (let y = 0; y < height; y++) {
      const row = make("tr");
      if (names) row.append(make("th", { scope: "row" }, names[y]));
      for (let x = 0; x < width; x++) {
        const value = values[y * width + x], cell = make("td", {}, text(value)), colour = colours[Math.max(0, code(x, y))];
        cell.style.backgroundColor = `rgb(${colour})`;
        const light = (colour[0] * 299 + colour[1] * 587 + colour[2] * 114) / 1000;
        cell.style.color = light > 140 ? "#1c1b19" : "#ffffff";
        row.append(cell);
      }
      body.append(row);
    }
    if (names) {
      const foot = make("tr");
      foot.append(make("td"));
      for (const label of names) foot.append(make("th", { scope: "col" }, label));
      body.append(foot);
    }
    return node;
  }
  function confusion(box, picture) {
    const [height, width] = picture.shape, values = figures[picture.data];
    if (!picture.exact || width !== height || width > 20) return matrix(box, picture);
    const sums = Array.from({ length: height }, (_, y) => values.slice(y * width, (y + 1) * width).reduce((a, b) => a + b, 0) || 1);
    const code = (x, y) => { const v = values[y * width + x]; return v ? Math.min(255, Math.round(40 + (v / sums[y]) * 190)) : 0; };
    box.append(grid(picture, values, code, "heat", (v) => (v ? String(v) : "")), make("p", { class: "at" }, "rows: the true class; columns: what the model said"));
  }
  function maps(box, picture) {
    const [h, w, height, width] = picture.shape, values = figures[picture.data];
    const canvas = cells(w * (width + 1) - 1, h * (height + 1) - 1, (x, y) => {
      const [i, j, a, b] = [Math.floor(y / (height + 1)), Math.floor(x / (width + 1)), y % (height + 1), x % (width + 1)];
      if (a === height || b === width) return -1;
      const v = values[((i * w + j) * height + a) * width + b];
      return picture.exact ? Math.round(((v - picture.low) / (picture.high - picture.low || 1)) * 255) : v;
    }, "heat");
    const size = Math.max(1, Math.min(14, Math.floor(340 / Math.max(canvas.width, canvas.height))));
    canvas.style.width = `${canvas.width * size}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${picture.title}: one map for each of ${h} by ${w} places${sampled(picture)}, from ${short(picture.low)} to ${short(picture.high)}`);
    box.append(canvas, make("p", { class: "at" }, `one map a place, ${h} × ${w}${sampled(picture)}; from ${short(picture.low)} to ${short(picture.high)}`));
  }
  function gallery(box, images) {
    const [count, height, width, channels] = images.shape, pixels = figures[images.data];
    box.replaceChildren();
    for (let n = 0; n < count; n++) {
      const canvas = make("canvas", { role: "img", "aria-label": images.labels[n] });
      [canvas.width, canvas.height] = [width, height];
      const image = new ImageData(width, height);
      for (let i = 0; i < height * width; i++) {
        const from = (n * height * width + i) * channels;
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[from + (channels === 3 ? c : 0)];
        image.data[4 * i + 3] = 255;
      }
      canvas.getContext("2d").putImageData(image, 0, 0);
      const node = make("figure");
      node.append(canvas, make("p", {}, images.labels[n]));
      box.append(node);
    }
  }

  // --- all of it ----------------------------------------------------------------------------

  function draw() {
    for (const { chart } of charts) chart.destroy();
    charts = [];
    for (const box of all(".tile .spark")) spark(box, plain(figures[Number(box.dataset.figure)]), false);
    for (const box of all("[data-chart]")) {
      const chart = data.charts[Number(box.dataset.chart)];
      lines(box, chart.lines.map((l) => ({ label: l.label, x: plain(figures[l.x]), y: plain(figures[l.y]) })), { log: chart.log });
    }
    fingerprint();
    for (const row of all('tr[data-row] .open[aria-expanded="true"]')) open(row.closest("tr"), true);
    for (const box of all("[data-picture]")) {
      const picture = data.pictures[Number(box.dataset.picture)];
      box.replaceChildren();
      ({ matrix, confusion, maps })[picture.form](box, picture);
    }
    for (const box of all("[data-gallery]")) gallery(box, data.gallery[Number(box.dataset.gallery)]);
  }
  async function start() {
    await unpack();
    table();
    draw();
    const asked = location.hash.startsWith("#parameter=") ? decodeURIComponent(location.hash.slice(11)) : null;
    const row = all("tr[data-row]").find((r) => r.dataset.name === asked);
    if (row) { open(row, true); row.scrollIntoView({ block: "start" }); }
    document.documentElement.dataset.drawn = "yes";
  }
  async function refresh() {
    const answer = await fetch(location.pathname);
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const opened = all('.open[aria-expanded="true"]').map((b) => b.closest("tr").dataset.name);
    const form = document.querySelector(".filter"), text = form?.elements.name.value, wrong = form?.elements.wrong.checked;
    const focus = document.activeElement?.closest?.("tr")?.dataset.name;
    document.getElementById("page").replaceWith(document.adoptNode(fresh.getElementById("page")));
    document.title = fresh.title;
    await start();
    for (const row of all("tr[data-row]")) {
      if (opened.includes(row.dataset.name)) open(row, true);
      if (row.dataset.name === focus) row.querySelector(".open").focus({ preventScroll: true });
    }
    const filter = document.querySelector(".filter");
    if (filter && text !== undefined) { filter.elements.name.value = text; filter.elements.wrong.checked = wrong; filter.oninput(); }
  }

  start();
  dark.addEventListener("change", draw);
  let later;
  addEventListener("resize", () => { clearTimeout(later); later = setTimeout(draw, 150); });
  const live = document.documentElement.dataset.live;
  if (live) {
    let busy = false;
    new EventSource(live).onmessage = async () => {
      if (busy) return;
      busy = true;
      try { await refresh(); } finally { busy = false; }
    };
  }
})();
