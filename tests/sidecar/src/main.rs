//! What the tests put into images that are no components: one static program that stands for a sidecar, for the
//! pause process of a pod, and for a look at a container from the inside. The commands are the arms of [`run`].

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};
use std::fs;
use std::hint::black_box;
use std::io::{BufRead as _, IsTerminal as _};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words).await {
        Ok(code) => ExitCode::from(code),
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> Result<u8> {
    // The first process of a container ignores a signal that it has no handler for: before all else.
    let mut terminate = signal(SignalKind::terminate())?;
    match words {
        // Waits to be told to end; also what a pod's sandbox runs.
        ["wait"] => drop(terminate.recv().await),
        // Says a line on each stream, then waits.
        ["say", text] => {
            println!("{text}");
            eprintln!("{text}");
            terminate.recv().await;
        }
        // Prints one numbered line after the other until it is told to end: count MILLISECONDS.
        ["count", pause] => {
            let pause = Duration::from_millis(pause.parse()?);
            for number in 0_u64.. {
                println!("{number}");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = terminate.recv() => break,
                }
            }
        }
        ["exit", code] => return Ok(code.parse()?),
        // Takes that much memory, every page of it: eat MIB.
        ["eat", mebibytes] => {
            let block = vec![1_u8; mebibytes.parse::<usize>()? << 20];
            black_box(&block);
            terminate.recv().await;
        }
        ["report"] => println!("{}", report()?),
        // Says what it reads, up to the end or a line `end`.
        ["echo"] => {
            for line in std::io::stdin().lock().lines() {
                match line?.as_str() {
                    "end" => break,
                    line => println!("read {line}"),
                }
            }
        }
        ["write", path] => fs::write(path, "written").with_context(|| format!("write {path}"))?,
        _ => bail!("{words:?}: no such command"),
    }
    Ok(0)
}

/// What a process finds of itself and of its container.
fn report() -> Result<Value> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let status = read("/proc/self/status")?;
    let status = status.lines().filter_map(|line| line.split_once(':'));
    let status: Map<String, Value> = status.map(|(key, value)| (key.to_owned(), value.trim().into())).collect();
    let environment: Map<String, Value> = std::env::vars().map(|(name, value)| (name, value.into())).collect();
    let mounts = read("/proc/self/mounts")?;
    let mounts: Vec<&str> = mounts.lines().collect();
    Ok(json!({
        "status": status,
        "environment": environment,
        "terminal": std::io::stdout().is_terminal(),
        "arguments": std::env::args().collect::<Vec<_>>(),
        "hostname": read("/proc/sys/kernel/hostname")?.trim(),
        "resolv": read("/etc/resolv.conf")?,
        "mounts": mounts,
    }))
}
