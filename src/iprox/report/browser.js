// The browser of examples: search, filter, sort. All text is inserted as text, never as markup.
(() => {
  "use strict";
  const PAGE = 12;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const turn = ([role, text, leftOut]) => {
    const box = element("div", role === "assistant" || role === "completion" ? "turn answer" : "turn");
    box.append(element("p", "role", role));
    const body = element("div", "text", text);
    body.dir = "auto";
    box.append(body);
    if (leftOut) box.append(element("p", "meta", `${leftOut} more characters are left out of this page.`));
    return box;
  };

  const shading = (pieces) => {
    const box = element("details", "shading");
    const text = element("div", "text");
    text.dir = "auto";
    text.append(
      ...pieces.map(([piece, classes, term]) => {
        const made = element("span", classes, piece);
        made.title = term;
        return made;
      }),
    );
    box.append(element("summary", "", "Token by token"), text);
    return box;
  };

  const card = (row, tasks) => {
    const made = element("article", "card");
    const head = element("header");
    const title = element("h4");
    title.append(element("span", "rank", `#${row.rank}`), " ", element("bdi", "", row.id));
    const meta = element("p", "meta");
    meta.append(element("bdi", "", row.source), ` · ${row.tokens} tokens`);
    if (row.selected) meta.append(" · ", element("span", "badge", "selected"));
    const scores = element("dl", "scores");
    const score = (name, value, className) => {
      const pair = element("div", className);
      pair.append(element("dt", "", name), element("dd", "", value));
      scores.append(pair);
    };
    score("influence", row.shown[0], "main");
    if (tasks.length > 1) tasks.forEach((task, place) => score(task, row.shown[place + 1], ""));
    head.append(title, meta, scores);
    made.append(head, ...row.turns.map(turn));
    if (row.pieces) made.append(shading(row.pieces));
    return made;
  };

  document.addEventListener("DOMContentLoaded", () => {
    const holder = document.getElementById("browser-data");
    if (!holder) return;
    const { tasks, rows } = JSON.parse(holder.textContent);
    for (const row of rows) row.words = [row.id, row.source, ...row.turns.map(([, text]) => text)].join("\n").toLowerCase();
    const [search, source, kind, order] = ["search", "source", "kind", "order"].map((name) =>
      document.getElementById(`browser-${name}`),
    );
    const list = document.getElementById("browser-list");
    const count = document.getElementById("browser-count");
    const more = document.getElementById("browser-more");
    let shown = PAGE;

    const matching = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const [place, direction] = order.value.split(" ").map(Number);
      return rows
        .filter((row) => !source.value || row.source === source.value)
        .filter((row) => !kind.value || row.selected === (kind.value === "selected"))
        .filter((row) => words.every((word) => row.words.includes(word)))
        .sort((a, b) => direction * (b.scores[place] - a.scores[place]) || a.row - b.row);
    };
    const draw = () => {
      const found = matching();
      list.replaceChildren(...found.slice(0, shown).map((row) => card(row, tasks)));
      count.textContent = found.length === 1 ? "1 example" : `${found.length.toLocaleString("en")} examples`;
      more.hidden = found.length <= shown;
    };
    const again = () => {
      shown = PAGE;
      draw();
    };
    search.addEventListener("input", again);
    for (const control of [source, kind, order]) control.addEventListener("change", again);
    more.addEventListener("click", () => {
      shown += PAGE;
      draw();
    });
    draw();
  });
})();
