//! What the figures should be, as ratios to the alternative that was measured in the same run.

use ::tests::report::table;
use serde_json::{Value, json};

/// A figure and its bound.
struct Target {
    figure: &'static str,
    /// Nothing when the case was not measured.
    measured: fn(&Cases) -> Option<f64>,
    bound: Bound,
    unit: &'static str,
}

enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

use Bound::{AtLeast, AtMost};

const TARGETS: [Target; 16] = [
    Target {
        figure: "fresh instance, made and dropped",
        measured: |of| of.number("instances/1 KiB/one thread/instance/cpu_us"),
        bound: AtMost(2.5),
        unit: " µs",
    },
    Target {
        figure: "fresh ÷ reused instance, 1 KiB",
        measured: |of| of.ratio("instances/1 KiB/one thread", "fresh", "reused", "cpu_us"),
        bound: AtMost(1.25),
        unit: "",
    },
    Target {
        figure: "fresh ÷ reused instance, 4 KiB",
        measured: |of| of.ratio("instances/4 KiB/one thread", "fresh", "reused", "cpu_us"),
        bound: AtMost(1.1),
        unit: "",
    },
    Target {
        figure: "fresh ÷ native, 4 KiB, with a model",
        measured: |of| of.ratio("instances/4 KiB/one thread", "fresh-learned", "native-learned", "cpu_us"),
        bound: AtMost(3.0),
        unit: "",
    },
    Target {
        figure: "CPU per message ÷ native, 1 KiB",
        measured: |of| of.ratio("throughput/1 KiB", "host", "native", "median/cpu_us_per_message"),
        bound: AtMost(1.65),
        unit: "",
    },
    Target {
        figure: "the same for an ordinary guest",
        measured: |of| of.ratio("throughput/1 KiB", "host-ordinary", "native", "median/cpu_us_per_message"),
        bound: AtMost(2.0),
        unit: "",
    },
    Target {
        figure: "throughput ÷ native, all cores",
        measured: |of| of.ratio("throughput/1 KiB", "host", "native", "median/messages_per_second"),
        bound: AtLeast(0.85),
        unit: "",
    },
    Target {
        figure: "two shards ÷ one, messages per CPU second",
        measured: |of| of.ratio("throughput/1 KiB", "host-1", "host", "median/cpu_us_per_message"),
        bound: AtLeast(0.9),
        unit: "",
    },
    Target {
        figure: "usual design's CPU per message ÷ host's",
        measured: |of| of.ratio("throughput/1 KiB", "usual", "host", "median/cpu_us_per_message"),
        bound: AtLeast(8.0),
        unit: "",
    },
    Target {
        figure: "with RUST_BACKTRACE=1 ÷ without, CPU per message",
        measured: |of| of.ratio("throughput/1 KiB", "host-backtrace", "host", "median/cpu_us_per_message"),
        bound: AtMost(1.05),
        unit: "",
    },
    Target {
        figure: "p99 at 2,000 messages/s ÷ native",
        measured: |of| of.ratio("latency/2000", "host", "native", "median/p99_us"),
        bound: AtMost(1.1),
        unit: "",
    },
    Target {
        figure: "cold start ÷ native",
        measured: |of| of.ratio("cold", "host", "native", "median_s"),
        bound: AtMost(1.2),
        unit: "",
    },
    Target {
        figure: "start of a cached .wasm ÷ of a .cwasm",
        measured: |of| of.ratio("cold", "host-cached", "host-everyday", "median_s"),
        bound: AtMost(1.05),
        unit: "",
    },
    Target {
        figure: "memory, idle, PSS",
        measured: |of| of.mib("memory/host/idle/pss_kib"),
        bound: AtMost(7.0),
        unit: " MiB",
    },
    Target {
        figure: "memory under load, PSS",
        measured: |of| of.mib("memory/host/loaded/pss_kib"),
        bound: AtMost(12.0),
        unit: " MiB",
    },
    Target {
        figure: "memory with 1,000 live instances, PSS",
        measured: |of| of.mib("memory/live/live/pss_kib"),
        bound: AtMost(28.0),
        unit: " MiB",
    },
];

/// What the cases found, by their names.
struct Cases<'a>(&'a Value);

impl Cases<'_> {
    fn number(&self, path: &str) -> Option<f64> {
        path.split('/').try_fold(self.0, |value, key| value.get(key))?.as_f64()
    }

    fn ratio(&self, within: &str, of: &str, to: &str, figure: &str) -> Option<f64> {
        let number = |key| self.number(&format!("{within}/{key}/{figure}"));
        Some(number(of)? / number(to)?)
    }

    fn mib(&self, path: &str) -> Option<f64> {
        Some(self.number(path)? / 1024.0)
    }
}

/// Compares what was measured with the targets: as a table, and as JSON.
pub fn compare(cases: &Value) -> (String, Value) {
    let (mut rows, mut json) = (Vec::new(), Vec::new());
    for Target { figure, measured, bound, unit } in &TARGETS {
        let Some(measured) = measured(&Cases(cases)) else { continue };
        let (sign, limit, met) = match bound {
            AtMost(most) => ("≤", most, measured <= *most),
            AtLeast(least) => ("≥", least, measured >= *least),
        };
        let met_text = if met { "yes" } else { "no" };
        rows.push(vec![
            (*figure).to_owned(),
            format!("{sign} {limit}{unit}"),
            format!("{measured:.2}{unit}"),
            met_text.to_owned(),
        ]);
        json.push(
            json!({ "figure": figure, "target": format!("{sign} {limit}{unit}"), "measured": measured, "met": met }),
        );
    }
    let text = table(&["", "target", "measured", "met"], &rows);
    (format!("Targets\n\n{text}"), Value::Array(json))
}
