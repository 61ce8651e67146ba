//! What a fresh instance costs by itself: processor time in one process, without NATS, on one thread and on all cores.

use crate::Report;
use crate::site::{Site, mail};
use anyhow::Result;
use bench::contestants::{Contestant, contestants, learned, message};
use serde_json::{Value, json};
use std::time::Duration;
use tests::report::{median, table, turns};

/// Processor time of a thread and measurement.
const TIME: Duration = Duration::from_millis(40);

/// Rounds, for one round of what takes seconds.
const ROUNDS: usize = 5;

const SIZES: [(&str, usize); 2] = [("1 KiB", 1024), ("4 KiB", 4096)];

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let rounds = ROUNDS * site.amount.rounds;
    tokio::task::spawn_blocking(move || measure(rounds)).await?
}

fn measure(rounds: usize) -> Result<Report> {
    let mut all = contestants()?;
    all.extend(learned()?);
    let cores = std::thread::available_parallelism()?.get();
    let kinds: Vec<(&str, usize, usize)> =
        SIZES.into_iter().flat_map(|(size, bytes)| [(size, bytes, 1), (size, bytes, cores)]).collect();
    let mut measured = Vec::new();
    for &(size, bytes, threads) in &kinds {
        let message = message(mail(bytes)?);
        let mut runs = vec![Vec::new(); all.len()];
        let numbers: Vec<usize> = (0..all.len()).collect();
        for round in 0..rounds {
            for &number in turns(&numbers, round) {
                runs[number].push(all[number].cpu_us(threads, &message, TIME)?);
            }
        }
        eprintln!("    instances, {size}, threads: {threads}");
        measured.push(runs);
    }
    Ok(Report { text: shown(&all, &kinds, &measured, rounds), json: as_json(&all, &kinds, &measured) })
}

fn shown(all: &[Contestant], kinds: &[(&str, usize, usize)], measured: &[Vec<Vec<f64>>], rounds: usize) -> String {
    let mut heads = vec![String::new()];
    for (size, _, threads) in kinds {
        let threads = if *threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
        heads.extend([format!("{size},\n{threads}"), "÷".to_owned()]);
    }
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let rows = all.iter().enumerate().map(|(number, contestant)| {
        // What has a model is compared with what has one.
        let native = all[..=number].iter().rposition(|contestant| contestant.key.starts_with("native")).unwrap_or(0);
        let mut row = vec![contestant.name.to_owned()];
        for runs in measured {
            let of = |number: usize| median(runs[number].iter().copied());
            row.extend([format!("{:.2} µs", of(number)), format!("{:.2}", of(number) / of(native))]);
        }
        row
    });
    let rows: Vec<_> = rows.collect();
    format!("Instances, CPU time for one message, medians of {rounds}, in turns\n\n{}", table(&heads, &rows))
}

fn as_json(all: &[Contestant], kinds: &[(&str, usize, usize)], measured: &[Vec<Vec<f64>>]) -> Value {
    let mut json = json!({});
    for ((size, _, threads), runs) in kinds.iter().zip(measured) {
        let threads = if *threads == 1 { "one thread" } else { "all cores" };
        for (contestant, runs) in all.iter().zip(runs) {
            json[size][threads][contestant.key] =
                json!({ "name": contestant.name, "cpu_us": median(runs.iter().copied()), "runs": runs });
        }
    }
    json
}
