//! How many messages a second, for how much processor time and memory: all of a full stream is settled.

use crate::Report;
use crate::site::{
    Drained, HOST, LEAN, Medians, NATIVE, ORDINARY, Program, REMEMBERING, Site, USUAL, Variant, mail, variant,
};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::report::{compared, table, turns};
use tests::streams;

/// All others are compared with the first.
const VARIANTS: [Variant; 10] = [
    NATIVE,
    HOST,
    Variant { args: &["--shards", "1"], ..variant("native-1", "native-handler, one shard", Program::Native) },
    Variant { args: &["--shards", "1"], ..variant("host-1", "host run, one shard", Program::Host(LEAN)) },
    variant("host-ordinary", "host run, ordinary guest", Program::Host(ORDINARY)),
    Variant { backtrace: true, ..variant("host-backtrace", "host run, RUST_BACKTRACE=1", Program::Host(LEAN)) },
    variant("native-everyday", "native-handler, everyday build", Program::EverydayNative),
    variant("host-everyday", "host run, everyday build", Program::EverydayHost(LEAN)),
    USUAL,
    Variant {
        args: &["--native", "--core-publish"],
        ..variant("native-core", "native, without PubAck", Program::Usual)
    },
];

/// Those that get larger mails too.
const LARGER: [Variant; 2] = [NATIVE, HOST];

/// Those that get mails of which each opens an issue of its own: what a memory of earlier mails costs.
const SHARING: [Variant; 3] = [
    HOST,
    Variant {
        args: &["--keyvalue", "memory"],
        ..variant("memory", "remembering, in the process", Program::Host(REMEMBERING))
    },
    Variant {
        args: &["--keyvalue", "nats:triage"],
        ..variant("nats", "remembering, on the server", Program::Host(REMEMBERING))
    },
];

/// Mails for those, for one that others get: each waits for the server several times.
const SHARING_PART: u64 = 10;

const SIZES: [(&str, usize); 2] = [("1 KiB", 1024), ("4 KiB", 4096)];

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let [(small, small_bytes), (large, large_bytes)] = SIZES;
    let count = site.amount.messages;
    site.fill(&mail(small_bytes)?, count).await?;
    let (text, json) = of(site, &VARIANTS, small).await?;
    site.fill(&mail(large_bytes)?, count).await?;
    let (more_text, more_json) = of(site, &LARGER, large).await?;
    let mail = String::from_utf8(mail(small_bytes)?)?;
    let numbered = |number: u64| {
        let of_its_own =
            mail.replace("20260302.0211@", &format!("{number}@")).replace("Subject: ", &format!("Subject: {number} "));
        of_its_own.into()
    };
    site.fill_with(count / SHARING_PART, numbered).await?;
    let (sharing_text, sharing_json) = of(site, &SHARING, "1 KiB, each of an issue of its own").await?;
    Ok(Report {
        text: format!("{text}\n{more_text}\n{sharing_text}"),
        json: json!({ small: json, large: more_json, "key-value": sharing_json }),
    })
}

async fn of(site: &mut Site, variants: &[Variant], size: &str) -> Result<(String, Value)> {
    let messages = streams::count(&site.bed.jetstream, streams::MAIL).await?;
    let mut runs: BTreeMap<&str, Vec<Drained>> = BTreeMap::new();
    for round in 0..site.amount.rounds {
        for variant in turns(variants, round) {
            runs.entry(variant.key).or_default().push(site.drain(variant, 1).await?);
        }
        eprintln!("    throughput, {size}: {} of {} rounds", round + 1, site.amount.rounds);
    }
    let title = format!("Throughput, mails of {size}, backlog of {messages} messages");
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
