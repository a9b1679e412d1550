"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const host = document.getElementById("timelines");
  const hint = document.getElementById("hint");
  const COMPUTE_KINDS = 5; // kinds 0 to 4 are compute; 5 to 7 are send, receive, reduce
  const many = data.ranks.length > 64;
  const ROW = many ? { compute: 8, thin: 1, gap: 2 } : { compute: 18, thin: 4, gap: 7 };
  const ROW_HEIGHT = ROW.compute + 3 * ROW.thin + ROW.gap;
  const whole = Math.max(...data.timelines.map((t) => t.end)) * 1.01;
  const view = { from: 0, to: whole };
  const pixels = () => Math.min(window.devicePixelRatio || 1, 2);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const duration = (us) =>
    us >= 1e6 ? `${(us / 1e6).toPrecision(4)} s`
      : us >= 1e3 ? `${(us / 1e3).toPrecision(4)} ms` : `${us.toPrecision(4)} µs`;
  const size = (bytes) => {
    const power = bytes < 1024 ? 0 : Math.floor(Math.log2(bytes) / 10);
    return `${+(bytes / 1024 ** power).toPrecision(4)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
  };

  const axis = document.createElement("canvas");
  axis.className = "axis";
  host.append(axis);
  const panels = data.timelines.map((timeline) => {
    const heading = document.createElement("h3");
    heading.textContent = `${timeline.name}: a step of ${duration(timeline.end)}`;
    const canvas = document.createElement("canvas");
    host.append(heading, canvas);
    const index = new Map(); // the same instruction of the other timeline, by rank, label and peer
    timeline.ranks.forEach((rows, rank) =>
      rows.forEach((row) => index.set(`${rank} ${row[3]} ${row[4]}`, row)));
    return { timeline, canvas, index };
  });

  const gutter = () => Math.min(many ? 70 : 150, host.clientWidth * 0.3);
  const place = (time) =>
    gutter() + ((time - view.from) / (view.to - view.from)) * (host.clientWidth - gutter());

  function prepare(canvas, height) {
    const ratio = pixels();
    canvas.width = Math.round(host.clientWidth * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, host.clientWidth, height);
    return pen;
  }

  function roundStep(span, count) {
    const rough = span / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough);
  }

  function times() {
    const step = roundStep(view.to - view.from, Math.max(2, host.clientWidth / 130));
    const found = [];
    for (let k = Math.ceil(view.from / step); k * step <= view.to; k += 1) found.push(k * step);
    return found;
  }

  function drawAxis() {
    const pen = prepare(axis, 24);
    const last = times().at(-1);
    const [scale, unit] = last >= 1e6 ? [1e6, "s"] : last >= 1e3 ? [1e3, "ms"] : [1, "µs"];
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = colour("--muted");
    if (!many) {
      pen.fillText("device", 0, 16);
      pen.textAlign = "right";
      pen.fillText("stage", gutter() - 18, 16);
    }
    pen.textAlign = "center";
    for (const time of times()) {
      if (place(time) > host.clientWidth - 24) continue;
      pen.fillText(`${+(time / scale).toPrecision(6)} ${unit}`, place(time), 16);
    }
  }

  function drawPanel({ timeline, canvas }) {
    const height = data.ranks.length * ROW_HEIGHT;
    const pen = prepare(canvas, height);
    const left = gutter();
    const right = host.clientWidth;
    data.ranks.forEach((rank, k) => {
      const top = k * ROW_HEIGHT;
      pen.fillStyle = colour("--track");
      pen.fillRect(left, top, right - left, ROW.compute);
      if (many && k % 8) return;
      pen.fillStyle = colour("--ink");
      pen.font = `${many ? 9 : 12}px system-ui, sans-serif`;
      pen.fillText(many ? rank.device : `${rank.device} · ${rank.type}`, 0, top + ROW.compute - (many ? 0 : 5), left - 34);
      if (many) return;
      pen.fillStyle = colour("--muted");
      pen.textAlign = "right";
      pen.fillText(`${rank.stage}`, left - 10, top + ROW.compute - 5);
      pen.textAlign = "left";
    });
    pen.save();
    pen.beginPath();
    pen.rect(left, 0, right - left, height);
    pen.clip();
    pen.strokeStyle = colour("--line");
    for (const time of times()) {
      pen.beginPath();
      pen.moveTo(place(time), 0);
      pen.lineTo(place(time), height);
      pen.stroke();
    }
    timeline.ranks.forEach((rows, rank) => rows.forEach((row) => drawRow(pen, rank, row)));
    pen.strokeStyle = colour("--ink");
    pen.setLineDash([4, 3]);
    pen.beginPath();
    pen.moveTo(place(timeline.end), 0);
    pen.lineTo(place(timeline.end), height);
    pen.stroke();
    pen.restore();
  }

  function lane(kind, rank) {
    const top = rank * ROW_HEIGHT;
    if (kind < COMPUTE_KINDS) return [top, ROW.compute];
    return [top + ROW.compute + (kind - COMPUTE_KINDS) * ROW.thin + 1, ROW.thin - (many ? 0 : 1)];
  }

  function drawRow(pen, rank, [kind, start, end, label]) {
    if (end < view.from || start > view.to) return;
    const x = place(start);
    const width = place(end) - x;
    const [y, height] = lane(kind, rank);
    pen.fillStyle = data.kinds[kind].colour;
    pen.fillRect(x, y, Math.max(width - (width > 4 ? 0.7 : 0), 0.6), height);
    if (kind >= COMPUTE_KINDS || many || width < 16) return;
    pen.fillStyle = kind === 1 ? "#000" : "#fff";
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    const short = label.replace(/^\d+[FB]/, "");
    if (pen.measureText(label).width < width - 6) pen.fillText(label, x + width / 2, y + 13);
    else if (pen.measureText(short).width < width - 4) pen.fillText(short, x + width / 2, y + 13);
    pen.textAlign = "left";
  }

  let waiting = false;
  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawAxis();
      panels.forEach(drawPanel);
    });
  }

  function show(from, to) {
    const span = Math.min(Math.max(to - from, whole * 1e-5), whole);
    view.from = Math.min(Math.max(from, 0), whole - span);
    view.to = view.from + span;
    draw();
  }
  function zoom(factor, at = (view.from + view.to) / 2) {
    show(at - (at - view.from) * factor, at + (view.to - at) * factor);
  }
  const move = (share) => {
    const by = share * (view.to - view.from);
    show(view.from + by, view.to + by);
  };
  const actions = {
    in: () => zoom(0.6), out: () => zoom(1 / 0.6), left: () => move(-0.25),
    right: () => move(0.25), reset: () => show(0, whole),
  };
  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "reset" };
  for (const button of document.querySelectorAll("[data-do]"))
    button.addEventListener("click", () => actions[button.dataset.do]());
  host.addEventListener("keydown", (event) => {
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    actions[action]();
  });

  const timeAt = (x) =>
    view.from + ((x - gutter()) / (host.clientWidth - gutter())) * (view.to - view.from);

  function under({ timeline }, x, y) {
    const rank = Math.floor(y / ROW_HEIGHT);
    if (x < gutter() || !timeline.ranks[rank]) return null;
    const slack = (2 * (view.to - view.from)) / host.clientWidth;
    const time = timeAt(x);
    const hits = timeline.ranks[rank].filter(([kind, start, end]) => {
      const [top, height] = lane(kind, rank);
      return start - slack <= time && time <= end + slack && y >= top - 1 && y <= top + height + 1;
    });
    const far = ([, start, end]) => Math.abs((start + end) / 2 - time);
    return hits.length ? { rank, row: hits.reduce((a, b) => (far(b) < far(a) ? b : a)) } : null;
  }

  function describe(panel, { rank, row }) {
    const [kind, start, end, label, peer, bytes] = row;
    const lines = [`${label} · ${data.kinds[kind].name}`, `${data.ranks[rank].device} (${data.ranks[rank].type}), stage ${data.ranks[rank].stage}`];
    lines.push(`${duration(end - start)}, from ${duration(start)} to ${duration(end)}`);
    if (peer !== undefined && peer !== null) lines.push(`with ${data.ranks[peer].device}`);
    if (bytes) lines.push(`${size(bytes)}, ${size((bytes / (end - start)) * 1e6)}/s`);
    for (const other of panels) {
      const same = other !== panel && other.index.get(`${rank} ${label} ${peer}`);
      if (same) lines.push(`${other.timeline.name}: ${duration(same[2] - same[1])}, from ${duration(same[1])}`);
    }
    return lines.join("\n");
  }

  function point(panel, event) {
    const box = panel.canvas.getBoundingClientRect();
    const found = under(panel, event.clientX - box.left, event.clientY - box.top);
    hint.hidden = !found;
    if (!found) return;
    hint.textContent = describe(panel, found);
    const x = Math.min(event.clientX + 14, window.innerWidth - hint.offsetWidth - 8);
    const below = event.clientY + 18;
    const fits = below + hint.offsetHeight < window.innerHeight;
    hint.style.left = `${Math.max(x, 8)}px`;
    hint.style.top = `${fits ? below : event.clientY - hint.offsetHeight - 12}px`;
  }

  const fingers = new Map();
  for (const panel of panels) {
    const { canvas } = panel;
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event.clientX);
      canvas.setPointerCapture(event.pointerId);
      point(panel, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (before === undefined) return point(panel, event);
      const scale = (view.to - view.from) / (host.clientWidth - gutter());
      const others = [...fingers].filter(([id]) => id !== event.pointerId);
      fingers.set(event.pointerId, event.clientX);
      if (others.length) {
        const anchor = others[0][1];
        const factor = Math.abs(before - anchor) / Math.max(Math.abs(event.clientX - anchor), 1);
        return zoom(factor, timeAt(anchor - canvas.getBoundingClientRect().left));
      }
      hint.hidden = true;
      const by = (before - event.clientX) * scale;
      return show(view.from + by, view.to + by);
    });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => { hint.hidden = true; });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(Math.exp(event.deltaY * 0.002), timeAt(event.clientX - canvas.getBoundingClientRect().left));
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) =>
      zoom(0.4, timeAt(event.clientX - canvas.getBoundingClientRect().left)));
  }

  new ResizeObserver(draw).observe(host);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
