//! `cargo xtask bench`: how fast the host is, beside what one would do without it, measured in the same run in turns.
//!
//! | module | what it measures |
//! |---|---|
//! | [`instances`] | an instance by itself, in one process |
//! | [`throughput`] | messages a second, processor time and memory |
//! | [`latency`] | from a message to its verdict, at a steady rate |
//! | [`cold`] | from the start of a process to its first message settled |
//! | [`memory`] | idle, under load, with a thousand instances alive |
//! | [`scaling`] | more hosts on one consumer, longer backlogs |
//!
//! [`site`] is what they stand on, [`targets`] what the figures should be, [`plot`] their picture. [`count`] is no
//! measurement: it is what executables do while they are counted.

mod cold;
mod count;
mod instances;
mod latency;
mod memory;
mod scaling;
mod site;
mod throughput;

use crate::site::{Amount, Site};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bench::{plot, targets};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tests::asked_to_stop;
use tests::report::{about, write, write_json};

/// What a case found.
pub struct Report {
    /// Tables.
    pub text: String,
    /// Everything that was measured.
    pub json: Value,
}

const CASES: [&str; 6] = ["instances", "throughput", "latency", "cold", "memory", "scaling"];

struct Options {
    amount: Amount,
    cases: Vec<&'static str>,
    json: PathBuf,
    svg: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    let work = async {
        match args.next_if_eq("count") {
            Some(_) => count::run(args).await,
            None => run(Options::parse(args).context("`cargo xtask help` says how it is run")?).await,
        }
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = asked_to_stop() => Err(anyhow!("interrupted")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let (mut quick, mut full, mut rounds, mut messages) = (false, false, None, None);
        let (mut cases, mut json, mut svg) = (Vec::new(), None, None);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg}: a value is missing"));
            match &*arg {
                "--quick" => quick = true,
                "--full" => full = true,
                "--rounds" => rounds = Some(value()?.parse().context("--rounds")?),
                "--messages" => messages = Some(value()?.parse().context("--messages")?),
                "--json" => json = Some(value()?.into()),
                "--svg" => svg = Some(value()?.into()),
                name => match CASES.iter().find(|case| **case == name) {
                    Some(case) => cases.push(*case),
                    None => bail!("{name}: no such case; there are {}", CASES.join(", ")),
                },
            }
        }
        let amount = Amount {
            rounds: rounds.unwrap_or(if quick { 1 } else { 3 }),
            messages: messages.unwrap_or(if quick { 10_000 } else { 100_000 }),
            load: Duration::from_secs(if quick { 1 } else { 3 }),
            full,
        };
        ensure!((1..=100).contains(&amount.rounds), "--rounds {}: between 1 and 100", amount.rounds);
        ensure!(
            (100..=1_000_000).contains(&amount.messages),
            "--messages {}: between 100 and 1000000",
            amount.messages
        );
        Ok(Self {
            amount,
            cases: if cases.is_empty() { CASES.to_vec() } else { cases },
            json: json.context("--json FILE is missing")?,
            svg: svg.context("--svg FILE is missing")?,
        })
    }
}

async fn run(options: Options) -> Result<()> {
    let began = Instant::now();
    let mut site = Site::new(options.amount).await?;
    let about = about(&[]);
    let (mut cases, mut text_of_targets) = (json!({}), String::new());
    for name in options.cases {
        let report = match name {
            "instances" => instances::run(&mut site).await,
            "throughput" => throughput::run(&mut site).await,
            "latency" => latency::run(&mut site).await,
            "cold" => cold::run(&mut site).await,
            "memory" => memory::run(&mut site).await,
            _ => scaling::run(&mut site).await,
        };
        let Report { text, json } = report.with_context(|| format!("the case {name}"))?;
        println!("{text}");
        cases[name] = json;
        let (text, targets) = targets::compare(&cases);
        text_of_targets = text;
        // After every case, so that one that fails costs nobody the others.
        write_json(&options.json, &json!({ "about": about, "targets": targets, "cases": cases }))?;
        write(&options.svg, &plot::svg(&cases, &latency::RATES))?;
        eprintln!("    {name} is done, {:.0} s", began.elapsed().as_secs_f32());
    }
    println!("{text_of_targets}");
    for (name, value) in &about {
        println!("{name}: {value}");
    }
    println!("all of it: {}, as a picture: {}", options.json.display(), options.svg.display());
    Ok(())
}
