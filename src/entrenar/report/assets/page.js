"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const colors = ["#3e7cb1", "#d1603d", "#4c9f70", "#8e5aa8", "#b8860b", "#5b6770"];
  const ink = () => getComputedStyle(document.body).color;
  const grid = () => getComputedStyle(document.documentElement).getPropertyValue("--line");
  const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
  const charts = [];
  const planned = [];  // every box has its place before the first chart measures its own

  // Series of several runs share one x axis: the union of their steps, with gaps where a run has no value.
  const joined = (pairs) => uPlot.join(pairs.map(([x, y]) => [x, y]), pairs.map(() => [2]));

  const marks = (plot) => {
    const context = plot.ctx;
    context.save();
    context.strokeStyle = "#b3261e";
    context.setLineDash([4, 4]);
    for (const run of runs) for (const [step] of run.events) {
      const x = plot.valToPos(step, "x", true);
      if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) continue;
      context.beginPath();
      context.moveTo(x, plot.bbox.top);
      context.lineTo(x, plot.bbox.top + plot.bbox.height);
      context.stroke();
    }
    context.restore();
  };

  const format = (value) => value == null ? "" : Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(5));

  const draw = (title, lines, { isLog = false } = {}) => {
    const shown = lines.filter((line) => line.y && line.y.some((value) => value != null));
    if (!shown.length) return;
    const box = document.createElement("div");
    box.className = "chart";
    const heading = document.createElement("h2");
    heading.textContent = title;
    box.append(heading);
    document.getElementById("charts").append(box);
    planned.push(() => charts.push(new uPlot({
      width: Math.max(260, box.clientWidth - 14), height: 260,
      scales: { x: { time: false }, y: { distr: isLog ? 3 : 1 } },
      cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
      axes: [axis, { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => tick == null ? "" : format(tick)) }],
      series: [{ label: "step" }, ...shown.map((line) => ({
        label: line.label, stroke: line.color, width: line.width ?? 1.5, alpha: line.alpha ?? 1, dash: line.dash, spanGaps: true,
        points: { show: line.y.length < 60 }, value: (_, value) => format(value),
      }))],
      hooks: { draw: [marks] },
    }, joined(shown.map((line) => [line.x, line.y])), box)));
  };

  const each = (key, more = {}) => runs.map((run, index) => ({ label: runs.length > 1 ? run.name : key, x: run.step, y: run[key], color: colors[index % 6], ...more }));

  const all = () => {
    for (const chart of charts.splice(0)) chart.destroy();
    document.getElementById("charts").replaceChildren();
    const isLog = document.getElementById("log").checked;
    const named = (run, word) => runs.length > 1 ? `${run.name}, ${word}` : word;
    const loss = runs.flatMap((run, index) => [
      ...(document.getElementById("raw").checked ? [{ label: named(run, "each step"), x: run.step, y: run.loss, color: colors[index % 6], width: 1, alpha: 0.35 }] : []),
      { label: named(run, "smoothed"), x: run.step, y: run.smooth, color: colors[index % 6], width: 2 },
      { label: named(run, "held-out"), x: run.eval_step, y: run.held_out.loss, color: colors[index % 6], width: 2, dash: [7, 4] },
    ]);
    draw("Loss", loss, { isLog });
    const figures = [...new Set(runs.flatMap((run) => Object.keys(run.held_out)))].filter((key) => key !== "loss");
    for (const key of figures) draw(`Held-out: ${key.replaceAll("_", " ")}`, runs.map((run, index) => ({ label: runs.length > 1 ? run.name : key, x: run.eval_step, y: run.held_out[key], color: colors[index % 6] })));
    draw("Learning rate", each("lr"));
    draw("Gradient norm", each("grad_norm"), { isLog: true });
    draw("Tokens per second", each("targets_per_s"));
    for (const plot of planned.splice(0)) plot();
  };

  document.getElementById("log").addEventListener("change", all);
  document.getElementById("raw").addEventListener("change", all);
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
    all();
  });
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(all, 150); });
  all();
})();
