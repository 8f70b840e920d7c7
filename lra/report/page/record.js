// A run's record: the facts that matter first, then every setting, and the record as it is.

// Returns the record with the sections that runs share in their places.
function wholeRecord(run, sections) {
  const filled = (value) =>
    value !== null &&
    typeof value === "object" &&
    "section" in value &&
    Object.keys(value).length === 1
      ? sections[value.section]
      : value;
  const all = (values) =>
    Object.fromEntries(Object.entries(values).map(([key, value]) => [key, filled(value)]));
  return { ...all(run.record), config: all(run.record.config) };
}

const count = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : value);
const percent = (value) => `${(100 * value).toFixed(2)} %`;
const rounded = (value, places) =>
  Number(value).toLocaleString("en-US", {
    minimumFractionDigits: places,
    maximumFractionDigits: places,
  });

function score(value) {
  if (!value) return undefined;
  const interval = `95 % interval ${(100 * value.low).toFixed(1)} to ${(100 * value.high).toFixed(1)}`;
  const loss = typeof value.loss === "number" ? value.loss.toFixed(4) : value.loss;
  return `${percent(value.accuracy)} of ${count(value.n)} (${interval}), loss ${loss}, at step ${count(value.step)}`;
}

// Returns the facts under each heading by their names; what a record does not have is undefined.
function facts(r) {
  const listed = (values, tell) =>
    Object.entries(values ?? {})
      .map(tell)
      .join(", ") || undefined;
  const joined = (...parts) => parts.filter(Boolean).join(", ");
  const { throughput: speed, device, task, tuning, parameters } = r;
  const train = r.config.train ?? {};
  const ratio = parameters && r.parameters_of_softmax && parameters / r.parameters_of_softmax;
  const memory = r.peak_memory_bytes && `${rounded(r.peak_memory_bytes / 1e6, 1)} MB`;
  const trial = ([, { lr, status, validation }]) =>
    `${lr}: ${typeof validation === "number" ? percent(validation) : status}`;
  return {
    Result: {
      status: joined(r.status, r.reason),
      "test accuracy": score(r.test),
      "validation accuracy": score(r.validation),
      "rules on the same test set": listed(
        task.baselines,
        ([rule, right]) => `${rule} ${percent(right)}`,
      ),
      steps: joined(
        `${count(r.steps)} of ${count(train.steps)}`,
        train.tested && `tested: ${train.tested}`,
      ),
    },
    "Speed and memory": {
      training:
        speed &&
        `${rounded(speed.steps_per_second, 2)} steps/s, ${rounded(speed.tokens_per_second, 0)} tokens/s`,
      "peak memory": memory ? `${memory} (${r.memory_kind})` : r.memory_kind || undefined,
      "training time": `${rounded(r.train_seconds, 1)} s`,
      "evaluation time": `${rounded(r.evaluation_seconds, 1)} s`,
      "other time": `${rounded(r.other_seconds, 1)} s`,
      "micro-batches": r.micro_batches,
      "made smaller": r.shrunk ? told(r.shrunk) : undefined,
      "measured on": joined(
        device.name,
        `${device.threads} threads`,
        r.precision.name,
        device.compiled && "compiled",
        device.activation_checkpointing && "activation checkpointing",
        device.processes > 1 && `${device.processes} processes`,
        device.runs_at_once > 1 && `${device.runs_at_once} runs at once`,
      ),
    },
    Setting: {
      protocol: r.protocol,
      departures: listed(
        r.modified,
        ([key, [was, is]]) => `${key}=${told(is)} (protocol: ${told(was)})`,
      ),
      attention: r.attention.name,
      options: listed(r.attention.options, ([key, value]) => `${key}=${told(value)}`),
      seed: String(r.seed),
      parameters:
        parameters && joined(count(parameters), ratio && `${ratio.toFixed(3)} of softmax's`),
      tuning: tuning
        ? `${tuning.name}, ${listed(tuning.trials, trial)}; chosen: ${tuning.chosen}`
        : undefined,
      command: r.command,
    },
    "Data and code": {
      data: `${task.name} version ${task.version}, ${task.data_hash ?? "not reached"}`,
      source: task.source,
      examples: listed(task.splits, ([split, { examples }]) => `${count(examples)} ${split}`),
      commit: `${r.commit.commit}${r.commit.dirty ? " (modified)" : ""}`,
      versions: listed(r.versions, (pair) => pair.join(" ")),
      started: joined(r.started, r.sessions > 1 && `${r.sessions} sessions`),
      "hash of the setting": r.hash,
    },
  };
}

function told(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function definitions(values) {
  const list = element("dl");
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined || value === null) continue;
    list.append(element("dt", { text: name }), element("dd", { text: String(value) }));
  }
  return list;
}

function folded(title, ...content) {
  return element("details", {}, element("summary", { text: title }), ...content);
}

// Returns the elements that show a run.
function recordBody(run, sections) {
  const record = wholeRecord(run, sections);
  const body = Object.entries(facts(record)).flatMap(([title, values]) => [
    element("h3", { text: title }),
    definitions(values),
  ]);
  const { model, train, task } = record.config;
  for (const [title, settings] of Object.entries({ Model: model, Training: train, Task: task })) {
    const values = Object.entries(settings ?? {}).map(([key, value]) => [key, told(value)]);
    if (values.length) body.push(folded(title, definitions(Object.fromEntries(values))));
  }
  if (run.evaluations.length) {
    const lines = run.evaluations.map(([step, seconds, accuracy, loss]) => [
      count(step),
      rounded(seconds, 1),
      (100 * accuracy).toFixed(2),
      typeof loss === "number" ? loss.toFixed(4) : DASH,
    ]);
    const columns = ["step", "seconds", "validation accuracy %", "validation loss"];
    body.push(folded("Evaluations", plainTable(columns, lines)));
  }
  body.push(folded("record.json", element("pre", { text: JSON.stringify(record, null, 1) })));
  return body;
}

function plainTable(columns, lines) {
  const line = (tag, cells) =>
    element("tr", {}, ...cells.map((text) => element(tag, { text, class: "number" })));
  const body = element("tbody", {}, ...lines.map((cells) => line("td", cells)));
  return element("table", {}, element("thead", {}, line("th", columns)), body);
}
