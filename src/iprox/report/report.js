// Themes, and drawing the charts. Runs in the head, so that the theme is set before anything is painted.
(() => {
  "use strict";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const STORE = "iprox-theme";

  // Storage can be forbidden for local files; then the choice lasts as long as the page.
  const remembered = () => {
    try {
      return localStorage.getItem(STORE);
    } catch {
      return null;
    }
  };
  const remember = (theme) => {
    try {
      localStorage.setItem(STORE, theme);
    } catch {
      // As above.
    }
  };

  const palette = () => {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const names = ["ink", "muted", "rule", "accent", "neutral", "faint", "surface", "page"];
    return Object.fromEntries(names.map((name) => [name, color(name)]));
  };

  const themedTrace = (trace, colors) => {
    const color = colors[trace.meta.color];
    if (trace.type === "bar" || trace.mode === "markers") {
      trace.marker = { ...trace.marker, color: color };
      // A ring's line takes the same color; a bar has no outline.
      if (trace.marker.line) trace.marker.line = { ...trace.marker.line, color: color };
    } else {
      trace.line = { ...trace.line, color: color };
      if (trace.fill) trace.fillcolor = color;
    }
    return trace;
  };

  const themedLayout = (layout, colors, font) => {
    layout.paper_bgcolor = "rgba(0,0,0,0)";
    layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: font, size: 12, color: colors.muted };
    layout.hoverlabel = {
      bgcolor: colors.surface,
      bordercolor: colors.muted,
      align: "left",
      font: { family: font, size: 12, color: colors.ink },
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      Object.assign(layout[name], {
        gridcolor: colors.rule,
        zerolinecolor: colors.neutral,
        linecolor: colors.neutral,
        exponentformat: "power",
      });
    }
    for (const shape of layout.shapes ?? []) shape.line = { ...shape.line, color: colors.ink, width: 1.5 };
    for (const note of layout.annotations ?? []) note.font = { ...note.font, color: colors.ink };
    return layout;
  };

  const draw = () => {
    const colors = palette();
    const font = getComputedStyle(document.body).fontFamily;
    for (const chart of document.querySelectorAll(".chart")) {
      const figure = JSON.parse(document.getElementById(`${chart.id}-data`).textContent);
      const traces = figure.data.map((trace) => themedTrace(trace, colors));
      // react() draws the first time and updates after that.
      Plotly.react(chart, traces, themedLayout(figure.layout, colors, font), {
        responsive: true,
        displayModeBar: false,
      });
    }
  };

  // Plotly is in the page as base64 of gzip, a third of its size. The policy runs a script of exactly its text.
  const loadPlotly = async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.text = await new Response(stream).text();
    document.body.append(script);
  };

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
  };
  const current = () => remembered() ?? (system.matches ? "dark" : "light");

  const markSection = () => {
    const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
    const watch = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) {
          if (!isIntersecting) continue;
          for (const [id, link] of links) {
            if (id === target.id) link.setAttribute("aria-current", "true");
            else link.removeAttribute("aria-current");
          }
        }
      },
      // The section under a line a quarter down the window is the one being read.
      { rootMargin: "-25% 0px -75% 0px" },
    );
    for (const section of document.querySelectorAll("main section")) watch.observe(section);
  };

  setTheme(current());
  document.addEventListener("DOMContentLoaded", async () => {
    setTheme(current());
    markSection();
    await loadPlotly();
    draw();
    document.getElementById("theme").addEventListener("click", () => {
      const theme = root.dataset.theme === "dark" ? "light" : "dark";
      remember(theme);
      setTheme(theme);
      draw();
    });
    system.addEventListener("change", () => {
      setTheme(current());
      draw();
    });
    // Paper is white: charts in dark colors would be unreadable on it.
    let before = root.dataset.theme;
    window.addEventListener("beforeprint", () => {
      before = root.dataset.theme;
      setTheme("light");
      draw();
    });
    window.addEventListener("afterprint", () => {
      setTheme(before);
      draw();
    });
  });
})();
