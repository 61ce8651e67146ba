//! Curves over time as a picture: SVG that a page can show, on light and dark ground.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 16.0;
const HEIGHT: f64 = 130.0;
const HEAD: f64 = 34.0;

const STYLE: &str = "text{font:13px sans-serif;fill:#222}.head{font-weight:bold}.small{font-size:11px}\
.l0{stroke:#888;fill:none;stroke-width:2}.l1{stroke:#4878a8;fill:none;stroke-width:2}.grid{stroke:#8884}\
@media(prefers-color-scheme:dark){text{fill:#ddd}.l0{stroke:#999}.l1{stroke:#7aa7d6}}";

/// One quantity over time, a curve for each variant.
pub struct Panel<'a> {
    /// What it is, with its unit.
    pub title: &'a str,
    /// Seconds and values of each variant.
    pub curves: Vec<Vec<(f64, f64)>>,
}

/// Draws the panels below each other, over the same time. There are at most two variants.
pub fn svg(variants: &[&str], panels: &[Panel<'_>]) -> String {
    let end = panels.iter().flat_map(|panel| &panel.curves).flatten().map(|(at, _)| *at).fold(1.0, f64::max);
    let mut body = String::new();
    let mut x = LEFT;
    for (number, variant) in variants.iter().enumerate() {
        let (to, text) = (x + 24.0, x + 30.0);
        _ = writeln!(
            body,
            "<path class=\"l{number}\" d=\"M{x} 16H{to}\"/><text x=\"{text}\" y=\"20\">{variant}</text>"
        );
        x += 60.0 + 8.0 * variant.len() as f64;
    }
    let mut top = 24.0;
    for panel in panels {
        draw(&mut body, panel, top + HEAD, end);
        top += HEAD + HEIGHT;
    }
    let base = top + 18.0;
    for step in 0..=6 {
        let seconds = end * f64::from(step) / 6.0;
        let x = LEFT + (WIDTH - LEFT - RIGHT) * f64::from(step) / 6.0;
        _ = writeln!(
            body,
            "<text class=\"small\" x=\"{x:.0}\" y=\"{base}\" text-anchor=\"middle\">{seconds:.0} s</text>"
        );
    }
    let height = base + 10.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\">\n<style>{STYLE}</style>\n{body}</svg>\n"
    )
}

fn draw(body: &mut String, panel: &Panel<'_>, top: f64, end: f64) {
    let most = panel.curves.iter().flatten().map(|(_, value)| *value).fold(0.0, f64::max).max(1.0);
    let (base, title) = (top + HEIGHT, panel.title);
    _ = writeln!(body, "<text class=\"head\" x=\"{LEFT}\" y=\"{}\">{title}</text>", top - 8.0);
    for (value, y) in [(most, top), (most / 2.0, top + HEIGHT / 2.0), (0.0, base)] {
        let (x, right, down) = (LEFT - 6.0, WIDTH - RIGHT, y + 4.0);
        _ = writeln!(
            body,
            "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>\
             <text class=\"small\" x=\"{x}\" y=\"{down:.1}\" text-anchor=\"end\">{value:.0}</text>"
        );
    }
    for (number, curve) in panel.curves.iter().enumerate() {
        let mut path = String::new();
        for (at, value) in curve {
            let (x, y) = (LEFT + (WIDTH - LEFT - RIGHT) * at / end, base - HEIGHT * value / most);
            _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { "M" } else { "L" });
        }
        _ = writeln!(body, "<path class=\"l{number}\" d=\"{path}\"/>");
    }
}
