//! Pages of the documentation, and how what they show is run.
//!
//! Fenced blocks by their tag:
//!
//! | tag | what the test does |
//! |---|---|
//! | `sh` | runs it with bash, all blocks of a page in order in one shell; `cargo xtask …`, which runs this test, is left out |
//! | `text` | right after an `sh` block: each of its lines is in that block's output, with `…` for what varies |
//! | `rust`, `toml`, `yaml` | writes it to the file that its first line names; `yaml` without one is for other tests |
//! | `json` | takes it for a verdict and validates it |
//! | `console`, `mermaid` | nothing: what cannot run here, pictures |
//!
//! Ports that a page names (9464, 8080) are replaced by free ones, and `PORT` by that of the nats-server which
//! `host run --dev` brings; the cache of a node, `/var/lib/mailroom/compiled`, by a folder that goes with the test.

use crate::process::Process;
use crate::tools;
use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A Markdown page of the repository.
#[derive(Debug)]
pub struct Page {
    /// From the top of the repository.
    pub path: String,
    /// Its fenced blocks.
    pub blocks: Vec<Block>,
    /// All that is not in a fenced block.
    pub prose: String,
    /// What its commands find in the copy of the repository beside what pages need anyway: the file or folder, its
    /// place.
    pub links: Vec<(PathBuf, &'static str)>,
}

/// A fenced block.
#[derive(Debug)]
pub struct Block {
    /// What is behind its fence.
    pub tag: String,
    /// What is in it.
    pub text: String,
    /// The line of its fence in the page, from 1.
    pub line: usize,
    /// Nothing but empty lines between it and the block before.
    follows: bool,
}

impl Page {
    /// Reads the page at `path`, from the top of the repository.
    ///
    /// # Errors
    /// When there is none, or one of its blocks does not end.
    pub fn read(path: &str) -> Result<Self> {
        let text = fs::read_to_string(tools::workspace().join(path)).with_context(|| format!("read {path}"))?;
        let (mut blocks, mut prose, mut open) = (Vec::new(), String::new(), None::<Block>);
        let mut follows = false;
        for (number, line) in (1..).zip(text.lines()) {
            match (&mut open, line.strip_prefix("```")) {
                (None, Some(tag)) => {
                    open = Some(Block { tag: tag.to_owned(), text: String::new(), line: number, follows });
                }
                (Some(_), Some("")) => {
                    blocks.extend(open.take());
                    follows = true;
                }
                (Some(block), _) => {
                    block.text += line;
                    block.text.push('\n');
                }
                (None, None) => {
                    follows &= line.is_empty();
                    prose += line;
                    prose.push('\n');
                }
            }
        }
        ensure!(open.is_none(), "{path}: a fenced block does not end");
        Ok(Self { path: path.to_owned(), blocks, prose, links: Vec::new() })
    }

    /// Lets all blocks have `new` where they have `old`.
    ///
    /// # Errors
    /// When none has it.
    pub fn replace(&mut self, old: &str, new: &str) -> Result<()> {
        ensure!(self.blocks.iter().any(|block| block.text.contains(old)), "{}: no block has {old}", self.path);
        for block in &mut self.blocks {
            block.text = block.text.replace(old, new);
        }
        Ok(())
    }

    /// The tables of the section under `heading` and its subsections: the last heading and the rows, without their
    /// first.
    pub fn tables(&self, heading: &str) -> Vec<(String, Vec<Vec<String>>)> {
        let level = heading.split(' ').next().unwrap_or_default().len();
        let depth = |line: &str| line.starts_with('#').then(|| line.len() - line.trim_start_matches('#').len());
        let lines = self.prose.lines().skip_while(|line| *line != heading);
        let section = lines.enumerate().take_while(|(at, line)| *at == 0 || depth(line).is_none_or(|d| d > level));
        let mut tables: Vec<(String, Vec<Vec<String>>)> = Vec::new();
        let (mut last, mut inside) = (heading, false);
        for (_, line) in section {
            let row = line.strip_prefix("| ").or(line.strip_prefix("|-")).and_then(|line| line.strip_suffix('|'));
            match row {
                None => {
                    inside = false;
                    last = if depth(line).is_some() { line } else { last };
                }
                Some(_) if !inside => {
                    inside = true;
                    tables.push((last.to_owned(), Vec::new()));
                }
                Some(row) if !line.starts_with("|-") => {
                    let cells = row.split(" |").map(|cell| cell.trim().to_owned()).collect();
                    tables.last_mut().into_iter().for_each(|(_, rows)| rows.push(Vec::clone(&cells)));
                }
                Some(_) => {}
            }
        }
        tables
    }

    /// Runs its blocks as one script in a copy of the repository, as far as pages need one, and compares the output.
    ///
    /// # Errors
    /// When a command fails, the output is another than the page shows, or it is not done at the deadline.
    pub async fn run(&self, environment: &[(&str, &str)], deadline: Duration) -> Result<()> {
        Script::of(self)?.run(environment, deadline).await
    }
}

impl Block {
    /// The file that the first line names in a comment.
    ///
    /// # Errors
    /// When it names none.
    pub fn file(&self) -> Result<&str> {
        let first = self.text.lines().next().unwrap_or_default();
        let name = first.strip_prefix("// ").or(first.strip_prefix("# "));
        name.filter(|name| name.contains('.')).context("the block's first line names no file")
    }
}

/// The blocks of a page as one bash script.
struct Script {
    page: String,
    /// What runs, with a marker before each block.
    text: String,
    /// The lines to expect in the output of the block with this number.
    expected: BTreeMap<usize, Vec<String>>,
    folder: tempfile::TempDir,
    links: Vec<(PathBuf, &'static str)>,
}

/// Where a node keeps compiled components; pages mean a folder of their own by it here.
const CACHE: &str = "/var/lib/mailroom/compiled";

/// Marks the output of a block; its number follows.
const MARKER: &str = "---- block ";

/// Ends what a page started in the background, in good order, whatever happened before. A build needs no network as long
/// as cargo has what it needs, and is kept for the next time.
const PRELUDE: &str = r#"
set -euo pipefail
end() {
    status=$?
    running=$(jobs -p)
    [ -z "$running" ] || kill $running 2>/dev/null || true
    wait
    exit $status
}
trap end EXIT
cargo() {
    if [ "$1" = build ]; then
        [ -e target ] || ln -s "$GUEST_TARGET" target
        command cargo "$@" --offline 2>/dev/null || command cargo "$@"
    else
        command cargo "$@"
    fi
}
dev_port() {
    until grep --only-matching 'host verdicts --server nats://127.0.0.1:[0-9]*' "$OUTPUT" | grep --only-matching '[0-9]*$'; do
        sleep 0.05
    done
}
"#;

impl Script {
    fn of(page: &Page) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("mailroom-page-").tempdir().context("make a temporary folder")?;
        let (mut text, mut expected) = (PRELUDE.to_owned(), BTreeMap::<usize, Vec<String>>::new());
        let (mut last, mut files) = (None, 0);
        for (number, block) in page.blocks.iter().enumerate() {
            match block.tag.as_str() {
                "sh" => {
                    let lines = block.text.lines().filter(|line| !line.starts_with("cargo xtask "));
                    let lines: Vec<_> = lines.collect();
                    writeln!(text, "echo '{MARKER}{number}'\n{}", lines.join("\n"))?;
                    last = Some(number);
                }
                "text" if block.follows => {
                    let lines = block.text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned);
                    expected.entry(last.context("output of nothing")?).or_default().extend(lines);
                }
                "yaml" if block.file().is_err() => {}
                "rust" | "toml" | "yaml" => {
                    files += 1;
                    let source = folder.path().join(format!("file-{files}"));
                    let block_text = block.text.replace(CACHE, &folder.path().join("cache").to_string_lossy());
                    fs::write(&source, block_text).with_context(|| format!("write {}", source.display()))?;
                    writeln!(text, "mkdir -p $(dirname '{1}') && cp '{0}' '{1}'", source.display(), block.file()?)?;
                }
                _ => {}
            }
        }
        Ok(Self { page: page.path.clone(), text, expected, folder, links: page.links.clone() })
    }

    async fn run(&self, environment: &[(&str, &str)], deadline: Duration) -> Result<()> {
        let (root, repository) = (tools::workspace(), self.folder.path().join("repository"));
        let components = tools::component("triage")?;
        let components = components.parent().context("the components' folder")?;
        let guest_target = components.parent().context("the target folder")?.join("doc-guest");
        fs::create_dir_all(&guest_target).with_context(|| format!("create {}", guest_target.display()))?;
        fs::create_dir_all(repository.join("target/release"))?;
        let mut links = vec![
            (root.join("wit"), "wit"),
            (root.join("tests"), "tests"),
            (components.to_owned(), "target/components"),
            (tools::host()?, "target/release/host"),
            (tools::host()?.with_file_name("train"), "target/release/train"),
        ];
        if self.text.contains("target/shim") {
            links.push((tools::shim()?, "target/shim"));
        }
        links.extend(self.links.iter().cloned());
        for (file, place) in links {
            let parent = repository.join(place).parent().context("a place in the repository")?.to_owned();
            fs::create_dir_all(&parent).with_context(|| format!("create {}", parent.display()))?;
            symlink(&file, repository.join(place)).with_context(|| format!("link to {}", file.display()))?;
        }
        let folder = if self.page == "docs/guests.md" { self.folder.path() } else { &repository };
        let output = self.folder.path().join("output");

        let (admin, http) = (free_port()?, free_port()?);
        let text = self.text.replace("127.0.0.1:PORT", "127.0.0.1:$(dev_port)");
        let text = text.replace("127.0.0.1:9464", &admin).replace("127.0.0.1:8080", &http);
        let mut bash = Command::new("bash");
        for (variable, _) in std::env::vars_os() {
            let name = variable.to_string_lossy();
            // What would change what the host or a build of a stranger's does.
            if name.starts_with("MAILROOM_")
                || name.starts_with("CARGO_") && name != "CARGO_HOME"
                || name == "RUSTFLAGS"
            {
                bash.env_remove(variable);
            }
        }
        let mut executables = vec![tools::host()?, tools::nats_server()?];
        if self.text.contains("wasmtime") {
            executables.push(tools::wasmtime()?);
        }
        if self.text.contains("kubectl") {
            executables.push(tools::kubectl()?);
        }
        let mut path = vec![repository.join("target/release")];
        path.extend(executables.iter().filter_map(|executable| executable.parent()).map(Path::to_owned));
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        bash.arg("-c").arg(format!("exec >\"$OUTPUT\" 2>&1\n{text}")).current_dir(folder).process_group(0);
        bash.env("PATH", std::env::join_paths(path)?).env("OUTPUT", &output).env("MAILROOM", &repository);
        bash.env("MAILROOM_LISTEN", &admin).env("GUEST_TARGET", guest_target).envs(environment.iter().copied());

        let mut bash = Group(Process::spawn("bash", bash)?);
        let ended = bash.0.wait(deadline).await;
        let printed = fs::read_to_string(&output).unwrap_or_default();
        let status = ended.with_context(|| format!("{}:\n{printed}", self.page))?;
        ensure!(status.success(), "{}: ended with {status}:\n{printed}", self.page);
        self.compare(&printed)
    }

    fn compare(&self, printed: &str) -> Result<()> {
        let mut outputs: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        let mut block = 0;
        for line in printed.lines() {
            match line.strip_prefix(MARKER).map(str::parse) {
                Some(number) => block = number?,
                None => outputs.entry(block).or_default().push(line),
            }
        }
        for (block, lines) in &self.expected {
            let output = outputs.get(block).map_or(&[][..], Vec::as_slice);
            for line in lines {
                let found = output.iter().any(|printed| matches(line, printed));
                ensure!(found, "{}: not printed: {line}\nbut:\n{}", self.page, output.join("\n"));
            }
        }
        Ok(())
    }
}

/// A process and all it started, killed together when this is dropped.
struct Group(Process);

impl Drop for Group {
    fn drop(&mut self) {
        let id = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        // Fails when nothing of it is left.
        _ = id.map(|id| kill_process_group(id, Signal::KILL));
    }
}

/// Whether `line` is `expected`, in which `…` stands for anything. Blanks count, how many does not.
pub fn matches(expected: &str, line: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (expected, line) = (plain(expected), plain(line));
    let pieces: Vec<_> = expected.split('…').collect();
    let [first, middle @ .., last] = &pieces[..] else { return expected == line };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for piece in middle {
        match rest.split_once(piece) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// `127.0.0.1:PORT` that nobody listens on. A program may take seconds before it does, so the port is one that the system
/// gives to nobody who just wants any.
///
/// # Errors
/// When there is none to be found.
pub fn free_port() -> Result<String> {
    for _ in 0..100 {
        let port = 20_000 + RandomState::new().hash_one(()) % 12_000;
        let address = format!("127.0.0.1:{port}");
        if TcpListener::bind(&address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no free port from 20000 to 32000")
}
