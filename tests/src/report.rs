//! What benchmarks print and write: tables, medians, and on what machine they were measured.

use crate::tools;
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Aligned columns: the first to the left, the others to the right. Heads may have two lines.
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let line =
        |number: usize| heads.iter().map(|head| head.lines().nth(number).unwrap_or_default().to_owned()).collect();
    let heads_have_two_lines = heads.iter().any(|head| head.contains('\n'));
    let head_lines = [line(0), line(1)].into_iter().take(1 + usize::from(heads_have_two_lines));
    let lines: Vec<Vec<String>> = head_lines.chain(rows.iter().cloned()).collect();
    let width = |column: usize| lines.iter().map(|line: &Vec<String>| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// A value and its ratio to the first variant's.
pub fn compared(value: f64, first: f64, scale: f64, unit: &str) -> [String; 2] {
    [format!("{:.1} {unit}", scale * value), format!("{:.2}", value / first)]
}

/// The value in the middle, or between the two there; no number of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count => (values[(count - 1) / 2] + values[count / 2]) / 2.0,
    }
}

/// `items` in another order each round: in as many rounds as there are items, each comes once after every other, for
/// what the one before left to be tidied costs the next one time.
pub fn turns<T>(items: &[T], round: usize) -> impl Iterator<Item = &T> {
    // 0, 1, last, 2, last but one, …
    let count = items.len();
    let places = (0..count).map(move |place| if place % 2 == 1 { place.div_ceil(2) } else { count - place / 2 });
    places.map(move |place| &items[(place + round) % count])
}

/// What was measured, and on what; `programs` that are installed, with their versions.
pub fn about(programs: &[&'static str]) -> BTreeMap<&'static str, String> {
    let first_line = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned())
    };
    let installed = |name: &str| {
        let path = tools::installed(name, name).ok()?;
        first_line(&path.to_string_lossy(), &["--version"])
    };
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let nats = tools::nats_server().ok().and_then(|path| first_line(&path.to_string_lossy(), &["--version"]));
    let nats = nats.map(|line| line.trim_start_matches("nats-server: ").to_owned());
    let unknown = || "unknown".to_owned();
    let mut about = BTreeMap::from([
        ("cores", std::thread::available_parallelism().map_or_else(|_| unknown(), |cores| cores.to_string())),
        ("processor", model.map_or_else(unknown, |(_, model)| model.to_owned())),
        ("kernel", kernel.map_or_else(unknown, |kernel| kernel.trim().to_owned())),
        ("nats-server", nats.unwrap_or_else(unknown)),
        ("wasmtime", locked_version("wasmtime").unwrap_or_else(unknown)),
        ("async-nats", locked_version("async-nats").unwrap_or_else(unknown)),
        ("commit", first_line("git", &["describe", "--always", "--dirty"]).unwrap_or_else(unknown)),
    ]);
    about.extend(programs.iter().map(|name| (*name, installed(name).unwrap_or_else(unknown))));
    about
}

/// The version of a crate in `Cargo.lock`.
fn locked_version(name: &str) -> Option<String> {
    let lock = fs::read_to_string(tools::workspace().join("Cargo.lock")).ok()?;
    let (_, rest) = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?;
    Some(rest.split('"').next()?.to_owned())
}

/// Writes `report` as JSON for people and programs; makes the folder if need be.
///
/// # Errors
/// When it cannot be written.
pub fn write_json(file: &Path, report: &impl Serialize) -> Result<()> {
    write(file, &format!("{}\n", serde_json::to_string_pretty(report)?))
}

/// Writes a text file; makes the folder if need be.
///
/// # Errors
/// When it cannot be written.
pub fn write(file: &Path, text: &str) -> Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

/// The memory of a process, as the kernel counts it, in KiB.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Its share: of pages that several processes map, each has a part.
    pub pss_kib: u64,
    /// Of it, what is in no file.
    pub anonymous_kib: u64,
    /// Of it, pages of files.
    pub file_kib: u64,
    /// All that it maps now, in full.
    pub rss_kib: u64,
}

impl Memory {
    /// Looks at a process.
    ///
    /// # Errors
    /// When there is none, or it is another user's.
    pub fn of(pid: u32) -> Result<Self> {
        let file = format!("/proc/{pid}/smaps_rollup");
        let kib = kib_in(&file)?;
        Ok(Self {
            pss_kib: kib("Pss:")?,
            anonymous_kib: kib("Pss_Anon:")?,
            file_kib: kib("Pss_File:")?,
            rss_kib: kib("Rss:")?,
        })
    }

    /// The most that a process has mapped so far, in KiB.
    ///
    /// # Errors
    /// When there is none.
    pub fn peak_of(pid: u32) -> Result<u64> {
        kib_in(&format!("/proc/{pid}/status"))?("VmHWM:")
    }
}

/// Finds figures by their names in a file of /proc.
fn kib_in(file: &str) -> Result<impl Fn(&str) -> Result<u64>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    let file = file.to_owned();
    Ok(move |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok());
        value.with_context(|| format!("no {name} in {file}"))
    })
}
