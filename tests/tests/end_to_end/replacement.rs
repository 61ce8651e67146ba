//! The component replaced while the host runs, and the digest that says which may.

use crate::crafted;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// The guest `actor` once more, told apart by a section of its own: another digest, the same behaviour.
fn actor(mark: &str) -> Result<Vec<u8>> {
    let mut component = std::fs::read(tools::component("actor")?)?;
    let length = u8::try_from(1 + mark.len()).ok().filter(|length| *length < 0x80).context("a short mark")?;
    component.extend([0, length, length - 1]);
    component.extend(mark.as_bytes());
    Ok(component)
}

/// Puts a file in the place of another as one should: renamed when it is whole.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes)?;
    std::fs::rename(&new, path).context("rename")
}

async fn digest_of(path: &Path) -> Result<String> {
    let path = path.display().to_string();
    let report = command::host(["inspect", "--json", &path]).await?.success()?.stdout;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    Ok(report["digest"].as_str().context("a digest")?.to_owned())
}

/// How often a component was loaded while the host ran, with this outcome.
async fn loads(host: &Host, outcome: &str) -> Result<f64> {
    host.metrics().await?.get("mailroom_component_loads_total", &[("outcome", outcome)]).context("no such outcome")
}

async fn until_loaded(host: &Host, outcome: &str, times: u32) -> Result<()> {
    let what = format!("{times} times {outcome}");
    eventually(SOON, &what, async || loads(host, outcome).await, |count| *count == f64::from(times)).await.map(drop)
}

async fn runs(host: &Host, digest: &str) -> Result<bool> {
    Ok(host.metrics().await?.get("mailroom_component_info", &[("digest", digest)]) == Some(1.0))
}

/// How many memory mappings the host has, and of how many files of compiled code.
fn mappings(host: &mut Host) -> Result<(usize, usize)> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", host.process().id()))?;
    let code: BTreeSet<&str> = maps.lines().filter_map(|line| line.find("/cache/").map(|at| &line[at..])).collect();
    Ok((maps.lines().count(), code.len()))
}

/// How many verdicts each component gave, by its digest.
fn by_component(verdicts: &[Stored]) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for verdict in verdicts {
        *counts.entry(verdict.header("Mailroom-Component").context("no component")?.to_owned()).or_default() += 1;
    }
    Ok(counts)
}

/// A host whose component is in a folder of its own, where it can be replaced.
struct Site {
    folder: tempfile::TempDir,
    bed: Bed,
}

impl Site {
    async fn new() -> Result<Self> {
        Ok(Self { folder: crafted::folder()?, bed: Bed::new().await? })
    }

    fn component(&self) -> PathBuf {
        self.folder.path().join("guest.wasm")
    }

    /// A ready host with the component that is there.
    async fn host(&self, component: &Path, args: &[&str]) -> Result<Host> {
        let host = Host::on(self.bed.server.url()).component(component).args(args);
        let host = host.env("MAILROOM_CACHE", self.folder.path().join("cache")).start().await?;
        host.until_ready(SOON).await?;
        Ok(host)
    }
}

/// A hundred replacements under load: every mail gets its one verdict, from one of the two components, and what was
/// replaced leaves nothing behind in memory.
#[tokio::test]
async fn a_hundred_replacements_under_load_lose_and_double_nothing() -> Result<()> {
    // Odd, so that the last component is not the first.
    const REPLACEMENTS: u32 = 101;
    // Mails that wait at most, so that the end is not far from the last replacement.
    const BACKLOG: u64 = 2_000;
    let site = Site::new().await?;
    let component = site.component();
    let both = [actor("one")?, actor("other")?];
    put(&component, &both[0])?;
    let first = digest_of(&component).await?;
    let mut host = site.host(&component, &["--shards", "2", "--slots", "8"]).await?;

    let enough = AtomicBool::new(false);
    let load = async {
        let mut told = 0;
        while !enough.load(Ordering::Relaxed) {
            told = site.bed.tell(std::iter::repeat_n("verdict support", 99).chain(["sleep 30"])).await?;
            site.bed.verdicts_at_least(told.saturating_sub(BACKLOG)).await?;
        }
        Ok(told)
    };
    let replacing = async {
        let (mut mapped, mut verdicts) = (None, 0);
        for (times, bytes) in (1..=REPLACEMENTS).zip(both.iter().rev().cycle()) {
            let look = async || streams::count(&site.bed.jetstream, streams::VERDICTS).await;
            verdicts = eventually(SOON, "the load goes on", look, |count| *count > verdicts + 50).await?;
            put(&component, bytes)?;
            host.signal(Signal::HUP)?;
            until_loaded(&host, "replaced", times).await?;
            if times == 10 {
                mapped = Some(mappings(&mut host)?.0);
            }
        }
        enough.store(true, Ordering::Relaxed);
        mapped.context("no tenth replacement")
    };
    let (told, mapped): (Result<u64>, Result<usize>) = tokio::join!(load, replacing);
    let (told, mapped) = (told?, mapped?);
    site.bed.one_verdict_each(told).await?;

    let counts = by_component(&streams::verdicts(&site.bed.jetstream).await?)?;
    let last = digest_of(&component).await?;
    assert_eq!(counts.len(), 2, "{counts:?}");
    for digest in [&first, &last] {
        assert!(counts.get(digest).is_some_and(|count| *count as u64 > told / 20), "{counts:?}");
    }
    assert!(runs(&host, &last).await? && !runs(&host, &first).await?);
    for outcome in ["refused", "unchanged"] {
        assert_eq!(loads(&host, outcome).await?, 0.0, "{outcome}");
    }
    let look = async || mappings(&mut host);
    let few = |(all, code): &(usize, usize)| *all < mapped + 100 && *code == 1;
    eventually(SOON, &format!("hardly more mappings than {mapped}"), look, few).await?;
    assert_eq!(host.stop(SOON).await?.code(), Some(0));
    Ok(())
}

/// A mail that is being triaged is finished by the component that began it; the next one has the new component, at the
/// same time. When the old one is done its machine code is gone.
#[tokio::test]
async fn what_runs_is_finished_by_the_old_component() -> Result<()> {
    let site = Site::new().await?;
    let component = site.component();
    put(&component, &actor("old")?)?;
    let old = digest_of(&component).await?;
    let mut host = site.host(&component, &["--shards", "1", "--deadline", "20s"]).await?;
    site.bed.tell(["sleep 4000"]).await?;
    let look = async || Ok(host.metrics().await?.get("mailroom_slots_in_use", &[]));
    eventually(SOON, "the guest runs", look, |slots| *slots == Some(1.0)).await?;

    put(&component, &actor("new")?)?;
    let new = digest_of(&component).await?;
    host.signal(Signal::HUP)?;
    let said = host.wait_for_line(SOON, |line| line.contains("component replaced")).await?;
    assert!(said.contains(&old) && said.contains(&new), "{said}");
    site.bed.tell(["verdict support", "reject it"]).await?;
    let verdicts = site.bed.verdicts(1).await?;
    assert_eq!((verdicts[0].mail_sequence()?, verdicts[0].header("Mailroom-Component")), (2, Some(new.as_str())));
    let letters = site.bed.dead_letters(1).await?;
    assert_eq!(letters[0].header("Mailroom-Component"), Some(new.as_str()));
    assert_eq!(mappings(&mut host)?.1, 2, "the old code is there while it runs");

    let verdicts = site.bed.verdicts(2).await?;
    assert_eq!((verdicts[1].mail_sequence()?, verdicts[1].header("Mailroom-Component")), (1, Some(old.as_str())));
    let look = async || Ok(mappings(&mut host)?.1);
    eventually(SOON, "the old code gone", look, |left| *left == 1).await.map(drop)
}

/// A component that would not have been taken at the start is not taken later either: the host says why and goes on with
/// the old one, also under full load.
#[tokio::test]
async fn a_broken_component_is_refused_and_the_old_one_goes_on() -> Result<()> {
    let site = Site::new().await?;
    let component = site.component();
    put(&component, &actor("good")?)?;
    let good = digest_of(&component).await?;
    let mut host = site.host(&component, &["--shards", "1", "--slots", "2", "--memory-max", "8MiB"]).await?;
    // Both slots are taken most of the time; a trial needs neither.
    site.bed.tell(std::iter::repeat_n("sleep 100", 60)).await?;

    let world = "package test:crafted; world crafted { export mailroom:triage/handler@0.1.0; }";
    let guest = |memory: &str, start: &str| {
        let module = format!(
            r#"(module {memory} {start}
                (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))
                (func (export "mailroom:triage/handler@0.1.0#triage")
                    (param i32 i32 i32 i32 i32 i32 i64 i32 i32 i32) (result i32) (i32.const 0)))"#
        );
        crafted::guest_of(&module, world)
    };
    let memory = r#"(memory (export "memory") 1)"#;
    let broken: [(Vec<u8>, &str); 6] = [
        (b"no component at all".to_vec(), "is no WebAssembly component"),
        (actor("good")?[..100_000].to_vec(), "no valid component"),
        (crafted::guest_importing("wasi:sockets/tcp@0.2.6")?, "imports wasi:sockets/tcp@0.2.6"),
        (guest(r#"(memory (export "memory") 1000)"#, "")?, "--memory-max"),
        (guest(memory, "(start $trap) (func $trap unreachable)")?, "breaks off before its first message"),
        (guest(memory, "(start $loop) (func $loop (loop (br 0)))")?, "breaks off before its first message"),
    ];
    for (times, (bytes, reason)) in (1..).zip(&broken) {
        put(&component, bytes)?;
        host.signal(Signal::HUP)?;
        until_loaded(&host, "refused", times).await?;
        let refused = |line: &str| line.contains("component not replaced, the old one goes on");
        let line = host.wait_for_line(SOON, |line| refused(line) && line.contains(reason)).await?;
        assert!(line.contains("ERROR") && line.contains(&good), "{line}");
    }
    std::fs::remove_file(&component)?;
    host.signal(Signal::HUP)?;
    until_loaded(&host, "refused", 7).await?;
    assert!(runs(&host, &good).await?);
    assert_eq!(host.ready().await?.0, 200);
    site.bed.one_verdict_each(60).await?;

    // And the one that runs is no news.
    put(&component, &actor("good")?)?;
    host.signal(Signal::HUP)?;
    until_loaded(&host, "unchanged", 1).await?;
    assert_eq!(loads(&host, "replaced").await?, 0.0);
    Ok(())
}

/// `--watch` notices every way in which files are replaced: renamed into place, behind a link as Kubernetes replaces a
/// ConfigMap, and written over, where half a file is refused and the whole one taken.
#[tokio::test]
async fn a_watched_file_is_loaded_when_it_changes() -> Result<()> {
    let site = Site::new().await?;
    let component = site.component();
    let (first, second) = (site.folder.path().join("..first"), site.folder.path().join("..second"));
    for (folder, mark) in [(&first, "first"), (&second, "second")] {
        std::fs::create_dir(folder)?;
        std::fs::write(folder.join("guest.wasm"), actor(mark)?)?;
    }
    let data = site.folder.path().join("..data");
    symlink(&first, &data)?;
    symlink("..data/guest.wasm", &component)?;
    let host = site.host(&component, &["--watch"]).await?;

    let other = site.folder.path().join("..data_tmp");
    symlink(&second, &other)?;
    std::fs::rename(&other, &data)?;
    until_loaded(&host, "replaced", 1).await?;
    assert!(runs(&host, &digest_of(&second.join("guest.wasm")).await?).await?);

    put(&component, &actor("third")?)?;
    until_loaded(&host, "replaced", 2).await?;

    let fourth = actor("fourth")?;
    std::fs::write(&component, &fourth[..fourth.len() / 2])?;
    until_loaded(&host, "refused", 1).await?;
    std::fs::write(&component, &fourth)?;
    until_loaded(&host, "replaced", 3).await?;
    assert!(runs(&host, &digest_of(&component).await?).await?);
    site.bed.tell(["verdict support"; 10]).await?;
    site.bed.one_verdict_each(10).await
}

/// Machine code that is written over while it runs does not change what runs, nor break it.
#[tokio::test]
async fn machine_code_that_is_written_over_goes_on_running() -> Result<()> {
    let site = Site::new().await?;
    let [component, other] = ["guest.cwasm", "other.cwasm"].map(|name| site.folder.path().join(name));
    for (path, mark) in [(&component, "one"), (&other, "other")] {
        put(&site.component(), &actor(mark)?)?;
        let [from, to] = [&site.component(), path].map(|path| path.display().to_string());
        command::host(["compile", &from, "--output", &to]).await?.success()?;
    }
    let mut host = site.host(&component, &[]).await?;
    let before = digest_of(&component).await?;
    std::fs::write(&component, [0xff; 4096])?;
    host.signal(Signal::HUP)?;
    until_loaded(&host, "refused", 1).await?;
    site.bed.tell(["verdict support"; 20]).await?;
    assert_eq!(by_component(&site.bed.verdicts(20).await?)?, BTreeMap::from([(before, 20)]));
    std::fs::write(&component, std::fs::read(&other)?)?;
    host.signal(Signal::HUP)?;
    until_loaded(&host, "replaced", 1).await?;
    site.bed.tell(["verdict support"; 20]).await?;
    site.bed.one_verdict_each(40).await
}

/// `--component-digest` names the one component that may run, as `.wasm` or as `.cwasm`: at the start, and whenever
/// another one takes its place. What is refused is named with both digests.
#[tokio::test]
async fn a_pinned_digest_lets_no_other_component_run() -> Result<()> {
    let site = Site::new().await?;
    let component = site.component();
    let compiled = component.with_extension("cwasm");
    put(&component, &actor("pinned")?)?;
    let pinned = digest_of(&component).await?;
    let [from, to] = [&component, &compiled].map(|path| path.display().to_string());
    command::host(["compile", &from, "--output", &to]).await?.success()?;
    let args = ["--component-digest", &pinned];
    drop(site.host(&compiled, &args).await?);
    let mut host = site.host(&component, &args).await?;

    put(&component, &actor("another")?)?;
    let another = digest_of(&component).await?;
    host.signal(Signal::HUP)?;
    until_loaded(&host, "refused", 1).await?;
    let told =
        |text: &str| [&pinned, &another, "--component-digest", "host inspect"].iter().all(|word| text.contains(*word));
    host.wait_for_line(SOON, told).await?;
    assert!(runs(&host, &pinned).await?);

    command::host(["compile", &from, "--output", &to]).await?.success()?;
    for path in [&from, &to] {
        let run = ["run", "--component", path, "--listen", "none", "--component-digest", &pinned];
        let output = command::host(run).await?;
        ensure!(output.code() == Some(1) && told(&output.stderr), "{output:?}");
    }
    let output = command::host(["run", "--component", &from, "--component-digest", "latest"]).await?;
    ensure!(output.code() == Some(2) && output.stderr.contains("64 hexadecimal digits"), "{output:?}");
    Ok(())
}
