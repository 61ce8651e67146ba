use anyhow::{Result, bail};
use std::fmt::Debug;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};

const POLL: Duration = Duration::from_millis(10);

/// Asks `probe` again and again until `wanted` accepts its value, and returns that value.
///
/// An error of the probe counts as "not yet", so that a server may be away meanwhile.
///
/// # Errors
/// When `deadline` has passed: names `what` and the last value or error seen.
pub async fn eventually<T: Debug>(
    deadline: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<T>,
    wanted: impl Fn(&T) -> bool,
) -> Result<T> {
    let end = Instant::now() + deadline;
    let mut last = None;
    loop {
        match timeout_at(end, probe()).await {
            Ok(Ok(value)) if wanted(&value) => return Ok(value),
            Ok(seen) => last = Some(seen),
            Err(_) => {}
        }
        if Instant::now() + POLL >= end {
            match last {
                Some(Ok(value)) => bail!("{what}: not within {deadline:?}; last seen: {value:?}"),
                Some(Err(err)) => bail!("{what}: not within {deadline:?}; last error: {err:#}"),
                None => bail!("{what}: not within {deadline:?}; the first look did not end"),
            }
        }
        sleep(POLL).await;
    }
}

/// Waits until somebody wants this process to end: at its terminal, by closing that, or otherwise.
pub async fn asked_to_stop() {
    let next = async |kind| match signal(kind) {
        Ok(mut signals) => drop(signals.recv().await),
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        () = next(SignalKind::interrupt()) => {}
        () = next(SignalKind::terminate()) => {}
        () = next(SignalKind::hangup()) => {}
    }
}
