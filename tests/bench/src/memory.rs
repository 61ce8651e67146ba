//! How much memory programs take: idle, under load, and with a thousand instances alive.

use crate::Report;
use crate::site::{HOST, LEAN, NATIVE, Program, Running, Site, USUAL, Variant, mail, variant};
use anyhow::{Result, bail};
use bench::contestants::{Keeper, message};
use serde_json::{Value, json};
use std::time::Duration;
use tests::bed::SOON;
use tests::report::{Memory, table};
use tests::{eventually, streams};
use tokio::time::sleep;

/// Those without libraries have all their memory to themselves, others share the libraries' pages with the system.
const VARIANTS: [Variant; 5] = [
    NATIVE,
    HOST,
    variant("native-everyday", "native-handler, everyday build", Program::EverydayNative),
    variant("host-everyday", "host run, everyday build", Program::EverydayHost(LEAN)),
    USUAL,
];

/// Instances that live together.
const LIVE: u32 = 1000;

/// A host with so many, of an ordinary guest that waits for the others in its only host call.
const WAITING: Variant = Variant {
    // Each shard takes as many messages as it has slots.
    args: &["--shards", "2", "--slots", "1000", "--max-in-flight", "500", "--deadline", "20s"],
    ..variant("live", "host run, 1,000 instances", Program::Host("actor"))
};
const WAIT_MS: u32 = 4000;

/// Measures all of it.
pub async fn run(site: &mut Site) -> Result<Report> {
    let mut rows = Vec::new();
    let mut json = serde_json::Map::new();
    let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
    let mut idle = Vec::new();
    site.empty(streams::MAIL).await?;
    for variant in &VARIANTS {
        let consumer = site.consumer().await?;
        let mut program = site.start(variant, &consumer).await?;
        if let Running::Host(host) = &program {
            host.until_ready(SOON).await?;
        }
        idle.push(at_rest(program.pid()).await?);
        program.stop().await?;
        site.forget(&consumer).await?;
    }
    site.fill(&mail(1024)?, site.amount.messages).await?;
    for (variant, idle) in VARIANTS.iter().zip(idle) {
        let loaded = site.drain(variant, 1).await?;
        rows.push(vec![
            variant.name.to_owned(),
            mib(idle.pss_kib),
            mib(idle.rss_kib),
            mib(loaded.pss_kib),
            mib(loaded.peak_rss_kib),
        ]);
        json.insert(variant.key.to_owned(), json!({ "name": variant.name, "idle": idle, "loaded": loaded }));
        eprintln!("    memory: {}", variant.name);
    }
    let (before, live) = live(site).await?;
    let each = live.pss_kib.saturating_sub(before.pss_kib) as f64 / f64::from(LIVE);
    rows.push(vec![
        WAITING.name.to_owned(),
        mib(before.pss_kib),
        mib(before.rss_kib),
        mib(live.pss_kib),
        mib(live.rss_kib),
    ]);
    json.insert(
        WAITING.key.to_owned(),
        json!({ "name": WAITING.name, "idle": before, "live": live, "each_kib": each }),
    );
    let answered_kib = tokio::task::spawn_blocking(answered_kib).await??;
    json.insert("answered".to_owned(), json!({ "each_kib": answered_kib }));
    let heads = ["", "idle,\nPSS", "idle,\nRSS", "under load,\nPSS", "under load,\nRSS"];
    let text = format!(
        "Memory\n\n{}\n{each:.1} KiB for each live instance of an ordinary guest that waits for the host\n\
         {answered_kib:.1} KiB for each of the triage that has answered and is kept, nothing but wasmtime\n",
        table(&heads, &rows)
    );
    Ok(Report { text, json: Value::Object(json) })
}

/// Looks at a program until its memory stays the same, but no more than so often.
const LOOKS_MAX: u32 = 10;

/// The memory of a program that has come to rest.
async fn at_rest(pid: u32) -> Result<Memory> {
    let mut memory = Memory::of(pid)?;
    for _ in 1..LOOKS_MAX {
        // What a start needed is given back a tenth of a second after it, and a busy machine is late.
        sleep(Duration::from_millis(1500)).await;
        let before = std::mem::replace(&mut memory, Memory::of(pid)?);
        if before.pss_kib == memory.pss_kib {
            break;
        }
    }
    Ok(memory)
}

/// What an instance of the triage takes that has answered a mail of 1 KiB, if [`LIVE`] of them live in this process.
fn answered_kib() -> Result<f64> {
    let message = message(mail(1024)?);
    let keeper = Keeper::new(LIVE)?;
    // What they share is there afterwards.
    drop(keeper.answered(&message)?);
    let before = Memory::of(std::process::id())?;
    let kept = (0..LIVE).map(|_| keeper.answered(&message)).collect::<Result<Vec<_>>>()?;
    let after = Memory::of(std::process::id())?;
    drop(kept);
    Ok(after.pss_kib.saturating_sub(before.pss_kib) as f64 / f64::from(LIVE))
}

/// The memory of a host before and while [`LIVE`] instances live.
async fn live(site: &mut Site) -> Result<(Memory, Memory)> {
    site.empty(streams::MAIL).await?;
    let consumer = site.consumer().await?;
    let mut program = site.start(&WAITING, &consumer).await?;
    let Running::Host(host) = &mut program else { bail!("{}: no host", WAITING.name) };
    host.until_ready(SOON).await?;
    let pid = host.process().id();
    let before = at_rest(pid).await?;
    site.bed.tell((0..LIVE).map(|_| format!("sleep {WAIT_MS}"))).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_pool_instances", &[]).unwrap_or_default());
    eventually(SOON, "a thousand instances live", look, |instances| *instances >= f64::from(LIVE)).await?;
    let live = Memory::of(pid)?;
    program.stop().await?;
    site.forget(&consumer).await?;
    Ok((before, live))
}
