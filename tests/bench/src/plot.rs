//! Throughput and latency as a picture: SVG that a page can show, on light and dark ground.

use serde_json::Value;
use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
/// Where bars begin, to the right of their names.
const LEFT: f64 = 230.0;
/// What is left for a number to the right of the longest bar; three of them need half as much again.
const RIGHT: f64 = 120.0;
const LINE: f64 = 22.0;

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.head{font-weight:bold}.bar{fill:#4878a8}.first{fill:#888}\
.line{stroke:#4878a8;stroke-width:3}.line.first{stroke:#888}.grid{stroke:#8884}\
@media(prefers-color-scheme:dark){text{fill:#ddd}.bar{fill:#7aa7d6}.line{stroke:#7aa7d6}.first{fill:#999}.line.first{stroke:#999}}";

/// Draws what `cases` has of it; latency at these messages a second.
pub fn svg(cases: &Value, rates: &[u32]) -> String {
    let mut picture = Picture { body: String::new(), y: 0.0 };
    let variants = &cases["throughput"]["1 KiB"];
    picture.bars("Messages a second, 1 KiB", variants, |of| of["median"]["messages_per_second"].as_f64(), "");
    picture.bars("CPU per message, 1 KiB", variants, |of| of["median"]["cpu_us_per_message"].as_f64(), " µs");
    for rate in rates {
        let title = format!("Latency at {rate} messages a second: p50, p99, p99.9, logarithmic");
        picture.ranges(&title, &cases["latency"][rate.to_string()]);
    }
    let Picture { body, y } = picture;
    let height = y + LINE / 2.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\">\n<style>{STYLE}</style>\n{body}</svg>\n"
    )
}

struct Picture {
    body: String,
    /// Where the next line goes.
    y: f64,
}

impl Picture {
    /// A bar for each variant that has the figure, from zero.
    fn bars(&mut self, title: &str, variants: &Value, figure: impl Fn(&Value) -> Option<f64>, unit: &str) {
        let all: Vec<_> = entries(variants).filter_map(|(name, class, of)| Some((name, class, figure(of)?))).collect();
        let most = all.iter().map(|(_, _, value)| *value).fold(0.0, f64::max);
        self.head(title, all.is_empty());
        for (name, class, value) in all {
            let length = (WIDTH - LEFT - RIGHT) * value / most;
            let top = self.y - 12.0;
            let rect =
                format!("<rect class=\"bar {class}\" x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"15\"/>");
            let digits = if value < 1000.0 { 1 } else { 0 };
            self.line(name, &rect, LEFT + length, &format!("{value:.digits$}{unit}"));
        }
    }

    /// A line for each variant from its 50th percentile over the 99th to that of 99.9.
    fn ranges(&mut self, title: &str, variants: &Value) {
        let of = |value: &Value| {
            let figure = |name: &str| value["median"][name].as_f64();
            Some([figure("p50_us")?, figure("p99_us")?, figure("p999_us")?])
        };
        let all: Vec<_> =
            entries(variants).filter_map(|(name, class, value)| Some((name, class, of(value)?))).collect();
        let least = all.iter().map(|(_, _, [p50, ..])| *p50).fold(f64::INFINITY, f64::min) / 1.5;
        let most = all.iter().map(|(_, _, [.., p999])| *p999).fold(0.0, f64::max);
        let x = |value: f64| LEFT + (WIDTH - LEFT - 1.5 * RIGHT) * (value / least).ln() / (most / least).ln();
        self.head(title, all.is_empty());
        for (name, class, values) in all {
            let y = self.y - 4.0;
            let [from, middle, to] = values.map(x);
            let mut marks = format!("<path class=\"line {class}\" d=\"M{from:.1} {y}H{to:.1}\"/>");
            for at in [from, middle, to] {
                _ = write!(marks, "<circle class=\"bar {class}\" cx=\"{at:.1}\" cy=\"{y}\" r=\"5\"/>");
            }
            let [p50, p99, p999] =
                values.map(|us| if us < 1e4 { format!("{us:.0} µs") } else { format!("{:.0} ms", us / 1e3) });
            self.line(name, &marks, to, &format!("{p50}, {p99}, {p999}"));
        }
    }

    fn head(&mut self, title: &str, is_empty: bool) {
        if !is_empty {
            self.y += 1.5 * LINE;
            _ = writeln!(self.body, "<text class=\"head\" x=\"8\" y=\"{}\">{title}</text>", self.y);
        }
    }

    fn line(&mut self, name: &str, marks: &str, end: f64, value: &str) {
        let y = self.y + LINE;
        let (before, after) = (LEFT - 10.0, end + 8.0);
        let marks = format!("<g transform=\"translate(0 {LINE})\">{marks}</g>");
        _ = writeln!(
            self.body,
            "<text x=\"{before}\" y=\"{y}\" text-anchor=\"end\">{name}</text>{marks}<text x=\"{after:.1}\" y=\"{y}\">{value}</text>"
        );
        self.y = y;
    }
}

/// The variants of a case with their names and how they look: the one that all are compared with is paler.
fn entries(variants: &Value) -> impl Iterator<Item = (&str, &'static str, &Value)> {
    let all = variants.as_object().into_iter().flatten();
    all.map(|(key, of)| (of["name"].as_str().unwrap_or(key), if key == "native" { "first" } else { "" }, of))
}
