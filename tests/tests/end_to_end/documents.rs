//! The pages are true: what they show runs, what they list is complete, where they point there is something.
//!
//! How their blocks run is told in [`tests::page`].

use crate::offline::commands;
use anyhow::anyhow;
use boon::{Compiler, SchemaIndex, Schemas};
use external_scaler::ScaledObjectRef;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use tests::Scaler;
use tests::bed::SOON;
use tests::page::{Block, Page, matches};
use tests::prelude::*;

/// The pages whose commands run below, or as the last one's in the tests of the shim; every page with an `sh` block is
/// one of them.
const RUN: [&str; 5] = ["README.md", "docs/operating.md", "docs/guests.md", "docs/kubernetes.md", "docs/triage.md"];

/// What the README shows runs.
#[tokio::test]
async fn commands_of_the_readme_run() -> Result<()> {
    Page::read("README.md")?.run(&[], Duration::from_secs(60)).await
}

/// What the operators' page shows runs, from an empty server to a drained host.
#[tokio::test]
async fn commands_of_the_operators_page_run() -> Result<()> {
    let server = NatsServer::start().await?;
    let environment = [("MAILROOM_SERVER", server.url())];
    Page::read("docs/operating.md")?.run(&environment, Duration::from_secs(180)).await
}

/// A guest comes into being from nothing as its page says, and runs.
#[tokio::test]
async fn commands_of_the_guests_page_run() -> Result<()> {
    // The first build compiles wit-bindgen; beside other tests that takes a while.
    Page::read("docs/guests.md")?.run(&[], Duration::from_secs(600)).await
}

/// The triage is configured and taught as its page says.
#[tokio::test]
async fn commands_of_the_triages_page_run() -> Result<()> {
    Page::read("docs/triage.md")?.run(&[], Duration::from_secs(60)).await
}

/// No page shows a command that nothing runs, and blocks are tagged with what is known here.
#[test]
fn every_block_has_a_known_tag_and_every_command_runs() -> Result<()> {
    for page in pages()? {
        for block in &page.blocks {
            let place = format!("{}:{}", page.path, block.line);
            match block.tag.as_str() {
                "sh" => ensure!(RUN.contains(&page.path.as_str()), "{place}: no test runs the commands of this page"),
                "rust" | "toml" => drop(block.file().with_context(|| place.clone())?),
                "json" => {
                    let verdict: Value = serde_json::from_str(&block.text).with_context(|| place.clone())?;
                    Schema::load()?.check(&verdict).with_context(|| place.clone())?;
                }
                // The tests of the permissions read it.
                "nats" => ensure!(page.path == "docs/security.md", "{place}: no test reads this block"),
                // The tests of the alert rules and of the manifests read them.
                "yaml" => {
                    let read = [RUN[1], RUN[3], "docs/scaling.md"];
                    ensure!(read.contains(&page.path.as_str()), "{place}: no test reads this block");
                }
                "text" | "console" | "mermaid" => {}
                tag => bail!("{place}: unknown tag {tag:?}"),
            }
        }
    }
    let readme = Page::read("README.md")?;
    for command in ["cargo xtask demo", "cargo xtask test"] {
        let shown = |block: &Block| block.text.lines().any(|line| line.starts_with(command));
        ensure!(readme.blocks.iter().any(shown), "README.md does not show {command}");
    }
    Ok(())
}

/// A relative link leads to a file, and its fragment to a heading.
#[test]
fn links_lead_somewhere() -> Result<()> {
    for page in pages()? {
        let folder = Path::new(&page.path).parent().context("the page's folder")?;
        for (_, rest) in page.prose.match_indices("](").map(|(at, _)| page.prose.split_at(at + 2)) {
            let target = rest.split(')').next().unwrap_or_default();
            if target.starts_with("https://") {
                continue;
            }
            let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { PathBuf::from(&page.path) } else { folder.join(file) };
            let text = fs::read_to_string(tools::workspace().join(&file));
            let text = text.with_context(|| format!("{}: link to {target}", page.path))?;
            let found = fragment.is_empty() || headings(&text).any(|heading| slug(heading) == fragment);
            ensure!(found, "{}: link to {target}: no such heading", page.path);
        }
    }
    Ok(())
}

/// The operators' page lists every flag of every command with its variable and its default, and no other.
#[tokio::test]
async fn flags_are_listed_as_they_are() -> Result<()> {
    let page = Page::read("docs/operating.md")?;
    let mut listed: BTreeMap<String, BTreeSet<Flag>> = BTreeMap::new();
    for (heading, rows) in page.tables("## Flags") {
        let commands = code_spans(&heading);
        let commands = commands.iter().filter_map(|span| span.strip_prefix("host "));
        for command in commands {
            let flags = listed.entry(command.to_owned()).or_default();
            for row in &rows {
                let cell = |at: usize| row.get(at).map(|cell| cell.replace('`', "")).unwrap_or_default();
                flags.insert(Flag { spec: cell(0), variable: cell(1), default: cell(2) });
            }
        }
    }

    let mut wrong = String::new();
    for command in commands().await? {
        let words = command.split(' ').chain(["--help"]);
        let has = flags_in(&command::host(words).await?.success()?.stdout);
        let mut says = listed.remove(&command).unwrap_or_default();
        // What is said of `host dead` holds for each of its commands.
        if let Some((group, _)) = command.split_once(' ') {
            says.extend(listed.get(group).into_iter().flatten().cloned());
        }
        for flag in has.difference(&says) {
            writeln!(wrong, "host {command} has {flag:?}, which is not on the page like that")?;
        }
        for flag in says.difference(&has) {
            writeln!(wrong, "host {command} is said to have {flag:?}")?;
        }
        if !page.prose.contains(&format!("### `host {command}`")) && !page.prose.contains(&format!("`host {command}`,"))
        {
            writeln!(wrong, "host {command} is not on the page")?;
        }
    }
    listed.remove("dead");
    listed.into_keys().for_each(|command| wrong += &format!("there is no host {command}\n"));
    ensure!(wrong.is_empty(), "docs/operating.md:\n{wrong}");
    Ok(())
}

/// The pages list every metric with its type and labels, and no other.
#[tokio::test]
async fn metrics_are_listed_as_they_are() -> Result<()> {
    let server = NatsServer::start().await?;
    command::host(["provision", "--server", server.url()]).await?.success()?;
    let host = Host::on(server.url()).start().await?;
    let mails = tools::mails()?;
    let publish = ["publish", "--server", server.url()].map(Into::into).into_iter();
    command::host(publish.chain(mails.into_iter().map(PathBuf::into_os_string))).await?.success()?;
    let read = async || Ok(http::get(&format!("{}/metrics", host.admin())).await?.body);
    let both = |text: &String| ["verdict", "dead"].iter().all(|name| text.contains(&format!("outcome=\"{name}\"")));
    let mut text = eventually(SOON, "verdicts and dead letters in the metrics", read, both).await?;
    drop(host);
    // What is granted has metrics of its own.
    for (component, grant, mail) in [
        ("keeper", ["--keyvalue", "memory"], "set a b"),
        ("caller", ["--allow-http", "http://127.0.0.1:1"], "ask GET http://127.0.0.1:1/"),
    ] {
        let host = Host::on(server.url()).component(tools::component(component)?).args(grant).start().await?;
        server.jetstream().await?.publish("mail.test", mail.into()).await?.await?;
        let read = async || Ok(http::get(&format!("{}/metrics", host.admin())).await?.body);
        let done = |text: &String| text.contains("outcome=\"verdict\"");
        text += &eventually(SOON, "a verdict in the metrics", read, done).await?;
    }
    metrics_are_listed("docs/operating.md", &text)?;

    let scaler = Scaler::ready(server.url()).await?;
    scaler.client().await?.get_metric_spec(ScaledObjectRef::default()).await.err().context("a trigger without keys")?;
    metrics_are_listed("docs/scaling.md", &scaler.metrics_text().await?)
}

/// The page's table has the metrics in `text`, and no other.
fn metrics_are_listed(page: &str, text: &str) -> Result<()> {
    let mut has: BTreeSet<(String, String, String)> = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').context("a type line")?;
        let sample = text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.strip_prefix("_count").unwrap_or(rest).strip_prefix('{')?.split_once('}')
        });
        let labels = sample.map(|(labels, _)| labels).unwrap_or_default();
        let labels: Vec<_> = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0)).collect();
        has.insert((name.to_owned(), kind.to_owned(), labels.join(", ")));
    }

    let path = page;
    let page = Page::read(path)?;
    let rows = page.tables("## Metrics and health").into_iter().flat_map(|(_, rows)| rows);
    let rows = rows.filter(|row| row[0].starts_with("`mailroom_"));
    let says: BTreeSet<_> = rows
        .map(|row| {
            let cell = |at: usize| row.get(at).map(|cell| cell.replace('`', "")).unwrap_or_default();
            (cell(0), cell(1), cell(2))
        })
        .collect();
    let (missing, extra): (Vec<_>, Vec<_>) = (has.difference(&says).collect(), says.difference(&has).collect());
    ensure!(missing.is_empty() && extra.is_empty(), "{path}: missing {missing:?}, not there {extra:?}");
    Ok(())
}

/// Prometheus takes the metrics and the page's alert rules, whose every metric exists, and the rules fire when they
/// should and not otherwise.
#[tokio::test]
async fn alert_rules_are_good() -> Result<()> {
    let page = Page::read("docs/operating.md")?;
    let rules = page.blocks.iter().find(|block| block.tag == "yaml").context("a block of rules")?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("alerts.yaml"), &rules.text)?;
    fs::write(folder.path().join("test.yaml"), include_str!("alerts.yaml"))?;
    let promtool = async |args: [&str; 3], input: &str| {
        let file = folder.path().join(args[2]);
        let args =
            [args[0], args[1]].map(Into::into).into_iter().chain(input.is_empty().then_some(file.into_os_string()));
        command::run(tools::promtool()?, args, input.as_bytes(), SOON).await?.success()
    };
    promtool(["check", "rules", "alerts.yaml"], "").await?;
    promtool(["test", "rules", "test.yaml"], "").await?;

    let server = NatsServer::start().await?;
    command::host(["provision", "--server", server.url()]).await?.success()?;
    let host = Host::on(server.url()).start().await?;
    let metrics = http::get(&format!("{}/metrics", host.admin())).await?.body;
    promtool(["check", "metrics", ""], &metrics).await?;
    for name in
        rules.text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| word.starts_with("mailroom_"))
    {
        ensure!(metrics.contains(&format!("# TYPE {name} ")) || name == "mailroom_messages_total", "no metric {name}");
        ensure!(page.prose.contains(&format!("`{name}`")), "no row for {name}");
    }
    Ok(())
}

/// What the pages for operators quote of errors is what the host and the shim say.
#[test]
fn quoted_errors_are_real() -> Result<()> {
    for (page, folders) in [("docs/operating.md", &["host"][..]), ("docs/kubernetes.md", &["host", "shim"])] {
        let mut source = String::new();
        for folder in folders {
            for file in files(&tools::workspace().join(folder), "rs")? {
                let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
                // A string that goes on in the next line after a backslash is one string.
                let mut pieces = text.split("\\\n");
                source += pieces.next().unwrap_or_default();
                pieces.for_each(|piece| source += piece.trim_start());
            }
        }
        let rows = Page::read(page)?.tables("## Trouble").into_iter().flat_map(|(_, rows)| rows);
        let quotes: Vec<_> = rows.flat_map(|row| code_spans(&row[0])).filter(|quote| quote.contains(' ')).collect();
        ensure!(!quotes.is_empty(), "{page} quotes nothing");
        for quote in quotes {
            for piece in quote.split('…').map(str::trim).filter(|piece| piece.len() > 2) {
                ensure!(source.contains(piece), "{page}: nothing in {folders:?} says {piece:?} ({quote})");
            }
        }
    }
    Ok(())
}

/// Every source file has its line in the architecture page, and every line its file.
#[test]
fn the_map_of_files_is_complete() -> Result<()> {
    let root = tools::workspace();
    let mut has = BTreeSet::new();
    let kinds = [("host", "rs"), ("guest", "rs"), ("shim", "rs"), ("tests", "rs"), ("xtask", "rs"), ("wit", "wit")];
    for (folder, extension) in kinds {
        for file in files(&root.join(folder), extension)? {
            has.insert(file.strip_prefix(&root)?.display().to_string());
        }
    }
    let page = Page::read("docs/architecture.md")?;
    let rows = page.tables("## Where things are").into_iter().flat_map(|(_, rows)| rows);
    let says: BTreeSet<_> = rows.flat_map(|row| code_spans(&row[0])).collect();
    let (missing, extra): (Vec<_>, Vec<_>) = (has.difference(&says).collect(), says.difference(&has).collect());
    ensure!(missing.is_empty() && extra.is_empty(), "docs/architecture.md: missing {missing:?}, not there {extra:?}");
    Ok(())
}

/// The schema takes what the host takes for a verdict, up to the bounds, and nothing beyond them.
#[tokio::test]
async fn the_schema_is_the_verdicts_form() -> Result<()> {
    let schema = Schema::load()?;
    let mut args = vec!["triage".into(), tools::component("triage")?.into_os_string()];
    args.extend(tools::mails()?.into_iter().map(PathBuf::into_os_string));
    let printed = command::host(args).await?.stdout;
    ensure!(printed.lines().count() > 30, "hardly any verdicts:\n{printed}");
    for line in printed.lines() {
        schema.check(&serde_json::from_str(line)?).with_context(|| line.to_owned())?;
    }

    let (longest, too_long) = ("q".repeat(64), "q".repeat(65));
    let (id, long_id) = ("i".repeat(256), "i".repeat(257));
    let actor = tools::component("actor")?;
    for (told, accepted) in [
        (format!("verdict {longest} urgent existing {id}"), true),
        (format!("verdict {too_long} low new i"), false),
        (format!("verdict support low new {long_id}"), false),
        ("verdict Support low new i".to_owned(), false),
        ("verdict a.b low new i".to_owned(), false),
        ("verdict a_b-0 low new ä".to_owned(), true),
        ("verdict support low new a\u{7f}b".to_owned(), false),
        ("verdict support low new ".to_owned(), false),
        ("reasons 16 256".to_owned(), true),
        ("reasons 17 1".to_owned(), false),
        ("reasons 1 257".to_owned(), false),
    ] {
        let actor = actor.as_os_str();
        let output =
            command::run(tools::host()?, ["triage".as_ref(), actor, "-".as_ref()], told.as_bytes(), SOON).await?;
        ensure!(output.status.success() == accepted, "the host on {told:?}: {output:?}");
        let verdict = if accepted { serde_json::from_str(&output.stdout)? } else { as_told(&told)? };
        ensure!(schema.check(&verdict).is_ok() == accepted, "the schema on {verdict}");
    }

    let verdict = json!({ "priority": "low", "issue": { "kind": "new", "id": "i" }, "queue": "q", "reasons": [] });
    schema.check(&verdict)?;
    for (pointer, wrong) in [
        ("/priority", json!("Low")),
        ("/priority", json!(1)),
        ("/issue", json!("i")),
        ("/issue/kind", json!("old")),
        ("/issue/id", json!("")),
        ("/queue", json!("")),
        ("/queue", json!("a b")),
        ("/queue", json!("a\n")),
        ("/reasons", json!("because")),
        ("/reasons", json!([1])),
    ] {
        let mut changed = verdict.clone();
        *changed.pointer_mut(pointer).context("a member")? = wrong;
        ensure!(schema.check(&changed).is_err(), "the schema takes {changed}");
    }
    for member in ["priority", "issue", "queue", "reasons"] {
        let mut changed = verdict.clone();
        changed.as_object_mut().context("an object")?.remove(member);
        ensure!(schema.check(&changed).is_err(), "the schema does without {member}");
    }
    Ok(())
}

/// The verdict that the actor was told to give, as JSON: what the host would have written if it had taken it.
fn as_told(told: &str) -> Result<Value> {
    let words: Vec<_> = told.split(' ').collect();
    match words[..] {
        ["verdict", queue, priority, kind, id] => {
            Ok(json!({ "priority": priority, "issue": { "kind": kind, "id": id }, "queue": queue, "reasons": [] }))
        }
        ["reasons", count, bytes] => {
            let reasons = vec!["r".repeat(bytes.parse()?); count.parse()?];
            let issue = json!({ "kind": "new", "id": "actor" });
            Ok(json!({ "priority": "normal", "issue": issue, "queue": "reasons", "reasons": reasons }))
        }
        _ => bail!("{told:?} tells of no verdict"),
    }
}

struct Schema {
    schemas: Schemas,
    verdict: SchemaIndex,
}

impl Schema {
    fn load() -> Result<Self> {
        let file = tools::workspace().join("docs/verdict.schema.json");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        let name = "file:///verdict.schema.json";
        compiler.add_resource(name, serde_json::from_str(&text)?).map_err(|err| anyhow!("{err:#}"))?;
        let verdict = compiler.compile(name, &mut schemas).map_err(|err| anyhow!("{err:#}"))?;
        Ok(Self { schemas, verdict })
    }

    fn check(&self, value: &Value) -> Result<()> {
        self.schemas.validate(value, self.verdict).map_err(|err| anyhow!("{err:#}"))
    }
}

/// A flag as the help or the page shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flag {
    /// `-c, --component FILE`
    spec: String,
    pub variable: String,
    pub default: String,
}

/// The flags in what `--help` prints; `-h` and `-V`, which every command has, are left out.
pub fn flags_in(help: &str) -> BTreeSet<Flag> {
    let begins = |line: &str| {
        let indent = line.len() - line.trim_start().len();
        matches!((indent, line.trim_start()), (2, flag) if flag.starts_with('-'))
            || matches!((indent, line.trim_start()), (6, flag) if flag.starts_with("--"))
    };
    let mut flags = BTreeSet::new();
    let mut lines = help.lines().peekable();
    while let Some(line) = lines.next() {
        if !begins(line) {
            continue;
        }
        let (spec, description) = line.trim().split_once("  ").unwrap_or((line.trim(), ""));
        let mut description = description.trim().to_owned();
        while let Some(more) = lines.next_if(|more| !begins(more) && (more.is_empty() || more.starts_with("   "))) {
            description += " ";
            description += more.trim();
        }
        let spec = spec.replace(['<', '>'], "");
        if spec.ends_with("--help") || spec.ends_with("--version") {
            continue;
        }
        let noted = |key: &str, ends: &[char]| {
            let value = description.split_once(&format!("[{key}: ")).map(|(_, rest)| rest.split(ends).next());
            value.flatten().unwrap_or_default().to_owned()
        };
        flags.insert(Flag { variable: noted("env", &['=', ']']), default: noted("default", &[']']), spec });
    }
    flags
}

/// All pages.
fn pages() -> Result<Vec<Page>> {
    let root = tools::workspace();
    let mut paths = vec!["README.md".to_owned(), "CONTRIBUTING.md".to_owned(), "CHANGELOG.md".to_owned()];
    for file in files(&root.join("docs"), "md")? {
        paths.push(file.strip_prefix(&root)?.display().to_string());
    }
    paths.iter().map(|path| Page::read(path)).collect()
}

/// The files below `folder` that end in `.extension`, sorted.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn headings(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim())
}

/// A heading as the fragment of a link, as GitHub makes it.
fn slug(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// What stands between backticks.
fn code_spans(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn dots_stand_for_anything() {
    for (expected, line, same) in [
        ("a  b", "a b", true),
        ("a b", "a bc", false),
        ("a … c", "a b c", true),
        ("a … c", "a b c d", false),
        ("…b…", "abc", true),
        ("a…b…c", "axbyc", true),
        ("a…b…c", "ac", false),
    ] {
        assert_eq!(matches(expected, line), same, "{expected:?} {line:?}");
    }
}
