//! More hosts on one consumer, and longer backlogs: what a message costs should stay the same.

use crate::Report;
use crate::site::{Drained, HOST, Medians, NATIVE, Site, mail};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::report::{compared, table, turns};

const PROGRAMS: [usize; 3] = [1, 2, 4];

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let mail = mail(1024)?;
    let most = site.amount.messages;
    site.fill(&mail, most).await?;
    let mut runs: BTreeMap<u64, Vec<Drained>> = BTreeMap::new();
    for round in 0..site.amount.rounds {
        for &programs in turns(&PROGRAMS, round) {
            runs.entry(programs as u64).or_default().push(site.drain(&HOST, programs).await?);
        }
        eprintln!("    scaling, hosts: {} of {} rounds", round + 1, site.amount.rounds);
    }
    let hosts = shown(&format!("Hosts on one consumer, {most} messages of 1 KiB"), &runs);

    let mut backlogs: BTreeMap<u64, Vec<Drained>> = BTreeMap::new();
    let mut native = backlogs.clone();
    let longest = site.amount.full.then_some(10 * most);
    for count in [most / 10, most].into_iter().chain(longest) {
        site.fill(&mail, count).await?;
        // Runs of ten times the length vary less.
        let rounds = if count > most { 1 } else { site.amount.rounds };
        for _ in 0..rounds {
            native.entry(count).or_default().push(site.drain(&NATIVE, 1).await?);
            backlogs.entry(count).or_default().push(site.drain(&HOST, 1).await?);
        }
        eprintln!("    scaling, backlog of {count}");
    }
    let text = [
        hosts,
        shown("One host, by the length of the backlog", &backlogs),
        shown("native-handler, by the length of the backlog", &native),
    ];
    let json = json!({ "hosts": as_json(&runs), "backlog": as_json(&backlogs), "backlog_native": as_json(&native) });
    Ok(Report { text: text.join("\n"), json })
}

fn shown(title: &str, runs: &BTreeMap<u64, Vec<Drained>>) -> String {
    let heads = ["", "messages/s", "÷", "CPU per\nmessage", "÷", "memory,\nPSS"];
    let medians: Vec<_> = runs.iter().map(|(count, runs)| (count, Medians::of(runs))).collect();
    let rows = medians.iter().map(|(count, of)| {
        let first = &medians[0].1;
        let mut row = vec![count.to_string(), format!("{:.0}", of.messages_per_second)];
        row.push(format!("{:.2}", of.messages_per_second / first.messages_per_second));
        row.extend(compared(of.cpu_us_per_message, first.cpu_us_per_message, 1.0, "µs"));
        row.push(format!("{:.1} MiB", of.pss_mib));
        row
    });
    format!("{title}\n\n{}", table(&heads, &rows.collect::<Vec<_>>()))
}

fn as_json(runs: &BTreeMap<u64, Vec<Drained>>) -> Value {
    let all =
        runs.iter().map(|(count, runs)| (count.to_string(), json!({ "median": Medians::of(runs), "runs": runs })));
    Value::Object(all.collect())
}
