//! How many messages a second, for how much processor time and memory: all of a full stream is settled.

use crate::Report;
use crate::site::{Drained, HOST, LEAN, Medians, NATIVE, ORDINARY, Program, Site, USUAL, Variant, mail, variant};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::report::{compared, table, turns};

/// All others are compared with the first.
const VARIANTS: [Variant; 8] = [
    NATIVE,
    HOST,
    Variant { args: &["--shards", "1"], ..variant("native-1", "native-handler, one shard", Program::Native) },
    Variant { args: &["--shards", "1"], ..variant("host-1", "host run, one shard", Program::Host(LEAN)) },
    variant("host-ordinary", "host run, ordinary guest", Program::Host(ORDINARY)),
    Variant { backtrace: true, ..variant("host-backtrace", "host run, RUST_BACKTRACE=1", Program::Host(LEAN)) },
    USUAL,
    Variant {
        args: &["--native", "--core-publish"],
        ..variant("native-core", "native, without PubAck", Program::Usual)
    },
];

/// Those that get larger mails too.
const LARGER: [Variant; 2] = [NATIVE, HOST];

const SIZES: [(&str, usize); 2] = [("1 KiB", 1024), ("4 KiB", 4096)];

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let [(small, small_bytes), (large, large_bytes)] = SIZES;
    let (text, json) = of(site, &VARIANTS, small, small_bytes).await?;
    let (more_text, more_json) = of(site, &LARGER, large, large_bytes).await?;
    Ok(Report { text: format!("{text}\n{more_text}"), json: json!({ small: json, large: more_json }) })
}

async fn of(site: &mut Site, variants: &[Variant], size: &str, bytes: usize) -> Result<(String, Value)> {
    site.fill(&mail(bytes)?, site.amount.messages).await?;
    let mut runs: BTreeMap<&str, Vec<Drained>> = BTreeMap::new();
    for round in 0..site.amount.rounds {
        for variant in turns(variants, round) {
            runs.entry(variant.key).or_default().push(site.drain(variant, 1).await?);
        }
        eprintln!("    throughput, {size}: {} of {} rounds", round + 1, site.amount.rounds);
    }
    let title = format!("Throughput, mails of {size}, backlog of {} messages", site.amount.messages);
    Ok((shown(&title, variants, &runs), as_json(variants, &runs)))
}

/// Runs as a table.
pub fn shown(title: &str, variants: &[Variant], runs: &BTreeMap<&str, Vec<Drained>>) -> String {
    let heads = ["", "messages/s", "÷", "CPU per\nmessage", "÷", "CPU per\n100,000", "memory,\nPSS", "peak,\nRSS"];
    let first = Medians::of(&runs[variants[0].key]);
    let rows = variants.iter().map(|variant| {
        let of = Medians::of(&runs[variant.key]);
        let mut row = vec![variant.name.to_owned(), format!("{:.0}", of.messages_per_second)];
        row.push(format!("{:.2}", of.messages_per_second / first.messages_per_second));
        row.extend(compared(of.cpu_us_per_message, first.cpu_us_per_message, 1.0, "µs"));
        row.push(format!("{:.2} s", of.cpu_us_per_message / 10.0));
        row.extend([format!("{:.1} MiB", of.pss_mib), format!("{:.1} MiB", of.peak_rss_mib)]);
        row
    });
    let rounds = runs[variants[0].key].len();
    format!("{title}, medians of {rounds}, in turns\n\n{}", table(&heads, &rows.collect::<Vec<_>>()))
}

/// Runs and their medians.
pub fn as_json(variants: &[Variant], runs: &BTreeMap<&str, Vec<Drained>>) -> Value {
    let all = variants.iter().map(|variant| {
        let runs = &runs[variant.key];
        (variant.key.to_owned(), json!({ "name": variant.name, "median": Medians::of(runs), "runs": runs }))
    });
    Value::Object(all.collect())
}
