//! The commands that need no server: compile, inspect, triage, and what the command line says about itself.

use crate::crafted;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use tests::prelude::*;

const HANDLER: &str = "mailroom:triage/handler@0.1.0";
const CONFIGURED: &str = "mailroom:triage/configured@0.1.0";

/// Most bytes of a guest's output that reach the log, with room for the log's own words on 16 lines.
const LOGGED_MAX_BYTES: usize = 24 << 10;

/// Runs `host triage COMPONENT -` on one mail from standard input.
async fn triage(component: &Path, args: &[&str], mail: &[u8]) -> Result<Output> {
    let fixed = ["triage".as_ref(), component.as_os_str(), "-".as_ref()];
    let args = fixed.into_iter().chain(args.iter().map(OsStr::new));
    command::run(tools::host()?, args, mail, Duration::from_secs(60)).await
}

/// The verdict of the guest `actor` on a mail that tells it what to do.
async fn acted(mail: &str) -> Result<Value> {
    let output = triage(&tools::component("actor")?, &[], mail.as_bytes()).await?.success()?;
    serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output:?}"))
}

async fn inspected(file: &Path) -> Result<Value> {
    let args = ["inspect".as_ref(), file.as_os_str(), "--json".as_ref()];
    let output = command::host(args).await?.success()?;
    serde_json::from_str(&output.stdout).context("read the report")
}

async fn compiled(input: &Path, output: &Path) -> Result<()> {
    let args = ["compile".as_ref(), input.as_os_str(), "--output".as_ref(), output.as_os_str()];
    command::host(args).await?.success().map(drop)
}

fn json_lines(text: &str) -> Result<Vec<Value>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line:?}"))).collect()
}

fn sample(name: &str) -> Result<Vec<u8>> {
    let path = tools::workspace().join("tests/mails").join(name);
    std::fs::read(&path).with_context(|| format!("read {}", path.display()))
}

fn imports(report: &Value) -> Vec<&str> {
    report["imports"].as_array().into_iter().flatten().filter_map(|import| import["name"].as_str()).collect()
}

/// `host compile triage.wasm` leaves `triage.cwasm` beside it, which gives the same verdicts under the same digest:
/// the digest says which component decided, not in which form it was loaded.
#[tokio::test]
async fn compiled_components_keep_digest_and_verdicts() -> Result<()> {
    let folder = crafted::folder()?;
    let component = crafted::file(folder.path(), "triage.wasm", std::fs::read(tools::component("triage")?)?)?;
    let output = command::host(["compile".as_ref(), component.as_os_str()]).await?.success()?;
    let machine_code = folder.path().join("triage.cwasm");
    ensure!(output.stderr.contains(&*machine_code.to_string_lossy()), "does not say what it wrote: {output:?}");

    let hash = command::run("sha256sum", [&component], b"", Duration::from_secs(60)).await?.success()?;
    let digest = format!("sha256:{}", hash.stdout.split(' ').next().unwrap_or_default());
    let (of_component, of_machine_code) = (inspected(&component).await?, inspected(&machine_code).await?);
    assert_eq!(of_component["digest"], *digest);
    assert_eq!(of_machine_code["digest"], *digest);
    assert_eq!(of_component["kind"], "component");
    assert_eq!(of_machine_code["kind"], "compiled component");
    assert_eq!(of_machine_code["imports"], of_component["imports"]);
    assert_eq!(of_machine_code["exports"], of_component["exports"]);

    let mail = sample("01-outage.eml")?;
    let verdict = triage(&component, &[], &mail).await?.success()?.stdout;
    assert_eq!(triage(&machine_code, &[], &mail).await?.success()?.stdout, verdict);
    Ok(())
}

/// What cannot be compiled, or written, is refused by name and leaves nothing behind.
#[tokio::test]
async fn a_refused_compilation_leaves_nothing_behind() -> Result<()> {
    let folder = crafted::folder()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let component = tools::component("triage")?.display().to_string();
    crafted::file(folder.path(), "text.wasm", "text")?;
    crafted::file(folder.path(), "no-world.wasm", wat::parse_str("(module)")?)?;
    crafted::file(folder.path(), "cut.wasm", &std::fs::read(&component)?[..5000])?;
    for (input, output, words) in [
        (&*path("missing.wasm"), &*path("a.cwasm"), ["missing.wasm", "No such file"]),
        (&path("text.wasm"), &path("a.cwasm"), ["text.wasm", "takes a component or a core module"]),
        (&path("no-world.wasm"), &path("a.cwasm"), ["no-world.wasm", "embeds no world"]),
        (&path("cut.wasm"), &path("a.cwasm"), ["cut.wasm", "no valid component"]),
        (&component, &path("a.txt"), ["a.txt", ".cwasm"]),
        (&component, &path("nowhere/a.cwasm"), ["nowhere/a.cwasm", "No such file"]),
    ] {
        let refused = command::host(["compile", input, "--output", output]).await?;
        ensure!(refused.code() == Some(1), "{input}: {refused:?}");
        ensure!(words.iter().all(|word| refused.stderr.contains(word)), "{input}: not {words:?}: {refused:?}");
    }
    let mut left: Vec<_> = folder.path().read_dir()?.flatten().map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["cut.wasm", "no-world.wasm", "text.wasm"]);
    Ok(())
}

/// A core module from a toolchain for WASI preview 1 becomes a component that runs like any other: its WASI calls are
/// adapted, and what it prints is in the log.
#[tokio::test]
async fn a_preview_1_module_becomes_a_guest() -> Result<()> {
    let folder = crafted::folder()?;
    let module = crafted::file(folder.path(), "module.wasm", crafted::preview1_module()?)?;
    let component = folder.path().join("component.wasm");
    compiled(&module, &component).await?;
    let report = inspected(&component).await?;
    assert_eq!((&report["kind"], &report["guest"]), (&json!("component"), &json!(true)));
    ensure!(imports(&report).iter().any(|import| import.starts_with("wasi:cli/stdout@0.2.")), "{report}");
    let of_module = inspected(&module).await?;
    assert_eq!((&of_module["kind"], &of_module["digest"]), (&json!("core module"), &report["digest"]));

    let output = triage(&component, &[], b"any").await?.success()?;
    let expected =
        json!({ "priority": "low", "issue": { "kind": "new", "id": "p1" }, "queue": "preview1", "reasons": [] });
    assert_eq!(json_lines(&output.stdout)?, [expected]);
    let log = json_lines(&output.stderr)?;
    ensure!(log.iter().any(|line| line["message"] == "preview 1 was here"), "not in the log: {log:?}");

    // Straight to machine code, without the component in between.
    let machine_code = folder.path().join("module.cwasm");
    compiled(&module, &machine_code).await?;
    assert_eq!(triage(&machine_code, &[], b"any").await?.success()?.stdout, output.stdout);
    Ok(())
}

/// The lean component imports no function.
#[tokio::test]
async fn the_lean_component_imports_only_what_it_uses() -> Result<()> {
    let report = inspected(&tools::component("triage")?).await?;
    let mut names = imports(&report);
    names.sort_unstable();
    assert_eq!(names, ["mailroom:triage/types@0.1.0"]);
    assert_eq!(report["exports"], json!([CONFIGURED, HANDLER]));
    assert_eq!(report["guest"], true);
    Ok(())
}

/// `host inspect` tells people whether a component is a guest, what it wants and what of that it would be refused.
#[tokio::test]
async fn inspect_says_what_a_component_is_and_wants() -> Result<()> {
    let lean = tools::component("triage")?;
    let text = command::host(["inspect".as_ref(), lean.as_os_str()]).await?.success()?.stdout;
    for words in
        ["digest   sha256:", &format!("yes: it exports {HANDLER}"), "import   mailroom:triage/types@0.1.0  (provided)"]
    {
        ensure!(text.contains(words), "not {words:?}: {text}");
    }
    let wit = command::host(["inspect".as_ref(), lean.as_os_str(), "--wit".as_ref()]).await?.success()?.stdout;
    for words in [format!("export {CONFIGURED};"), format!("export {HANDLER};")] {
        ensure!(wit.contains(&words), "not {words:?}: {wit}");
    }

    let http = inspected(&tools::component("triage-http")?).await?;
    assert_eq!(http["guest"], false);
    let folder = crafted::folder()?;
    let greedy = crafted::file(folder.path(), "greedy.wasm", crafted::guest_importing("wasi:sockets/tcp@0.2.6")?)?;
    let text = command::host(["inspect".as_ref(), greedy.as_os_str()]).await?.success()?.stdout;
    let line = text.lines().find(|line| line.contains("wasi:sockets/tcp@0.2.6")).context("the import is not shown")?;
    ensure!(line.contains("refused") && line.contains("no network"), "{line}");

    for (name, bytes) in
        [("empty.wasm", &b""[..]), ("text.wasm", b"text"), ("cut.wasm", &std::fs::read(&lean)?[..5000])]
    {
        let file = crafted::file(folder.path(), name, bytes)?;
        let refused = command::host(["inspect".as_ref(), file.as_os_str()]).await?;
        ensure!(refused.code() == Some(1) && refused.stderr.contains(name), "{name}: {refused:?}");
        ensure!(refused.stdout.is_empty(), "{name}: {refused:?}");
    }
    Ok(())
}

/// The WIT that `host inspect` prints is whole: one can read from it what the functions take and give.
#[tokio::test]
async fn the_printed_wit_has_the_functions_and_types() -> Result<()> {
    let lean = tools::component("triage")?;
    let wit = command::host(["inspect".as_ref(), lean.as_os_str(), "--wit".as_ref()]).await?.success()?.stdout;
    for words in ["package mailroom:triage@0.1.0", "record message", "triage: func(message: message)"] {
        ensure!(wit.contains(words), "no {words:?}: {wit}");
    }
    let mut resolve = wit_parser::Resolve::default();
    resolve.push_str("printed.wit", &wit).context("the printed WIT does not stand alone")?;
    Ok(())
}

/// The same mail gets the same verdict as a file, from standard input, in an mbox and in a Maildir.
#[tokio::test]
async fn mails_are_triaged_wherever_they_lie() -> Result<()> {
    let component = tools::component("triage")?;
    let names = ["01-outage.eml", "02-outage-reply.eml", "04-invoice-question.eml"];
    let mails: Vec<Vec<u8>> = names.iter().map(|name| sample(name)).collect::<Result<_>>()?;
    let mut single = String::new();
    for mail in &mails {
        single += &triage(&component, &[], mail).await?.success()?.stdout;
    }
    assert_eq!(single.lines().count(), 3);

    let folder = crafted::folder()?;
    let maildir = folder.path().join("Maildir");
    for part in ["cur", "new", "tmp"] {
        std::fs::create_dir_all(maildir.join(part))?;
    }
    let mut mbox = Vec::new();
    for (number, mail) in mails.iter().enumerate() {
        let part = if number == 0 { "cur" } else { "new" };
        crafted::file(&maildir.join(part), &format!("170000000{number}.test"), mail)?;
        mbox.extend_from_slice(b"From test@example.com Thu Jan  1 00:00:00 1970\n");
        mbox.extend_from_slice(mail);
        mbox.extend_from_slice(b"\n");
    }
    crafted::file(&maildir.join("tmp"), "1700000009.test", "half a mail")?;
    let mbox = crafted::file(folder.path(), "archive.mbox", mbox)?;
    for paths in
        [names.map(|name| tools::workspace().join("tests/mails").join(name)).to_vec(), vec![mbox], vec![maildir]]
    {
        let args = ["triage".as_ref(), component.as_os_str()].into_iter();
        let output = command::host(args.chain(paths.iter().map(|path| path.as_os_str()))).await?.success()?;
        assert_eq!(output.stdout, single, "{paths:?}");
    }
    Ok(())
}

/// A mail without a verdict is reported by name and makes the exit code 1; the others have their verdicts.
#[tokio::test]
async fn a_rejected_mail_does_not_keep_the_others_from_their_verdicts() -> Result<()> {
    let mails = tools::workspace().join("tests/mails");
    let [good, bad, missing] = ["01-outage.eml", "39-not-a-mail.eml", "missing.eml"].map(|name| mails.join(name));
    let component = tools::component("triage")?;
    let paths = [component.as_os_str(), bad.as_os_str(), missing.as_os_str(), good.as_os_str()];
    let args = ["triage"].map(OsStr::new).into_iter().chain(paths);
    let output = command::host(args.clone()).await?;
    assert_eq!(output.code(), Some(1));
    assert_eq!(json_lines(&output.stdout)?.len(), 1);
    let errors: Vec<&str> = output.stderr.lines().collect();
    ensure!(errors.len() == 2, "{errors:?}");
    ensure!(errors[0].contains("39-not-a-mail.eml: rejected: no mail"), "{errors:?}");
    ensure!(errors[1].contains("missing.eml: No such file"), "{errors:?}");

    let named = command::host(args.chain(["--json", "--names"].map(OsStr::new))).await?;
    assert_eq!(named.code(), Some(1));
    let lines = json_lines(&named.stdout)?;
    assert_eq!(lines.len(), 3, "a line for each path: {lines:?}");
    assert_eq!(lines[0]["mail"], *bad.to_string_lossy());
    ensure!(lines[0]["failure"].as_str().is_some_and(|failure| failure.starts_with("rejected: ")), "{lines:?}");
    ensure!(lines[1]["failure"].as_str().is_some_and(|failure| failure.contains("missing.eml: No such")), "{lines:?}");
    assert_eq!(lines[2]["mail"], *good.to_string_lossy());
    assert_eq!(vec![lines[2]["verdict"].clone()], json_lines(&output.stdout)?);
    Ok(())
}

/// A script that reads `--json --names` learns which mail could not be read, as for any other failure.
#[tokio::test]
async fn a_mail_that_cannot_be_read_is_named() -> Result<()> {
    let component = tools::component("triage")?.display().to_string();
    let output = command::host(["triage", &component, "/nonexistent/missing.eml", "--json", "--names"]).await?;
    assert_eq!(output.code(), Some(1));
    let lines = json_lines(&output.stdout)?;
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["mail"], "/nonexistent/missing.eml", "{lines:?}");
    Ok(())
}

/// Configuration reaches the guest: the default queue is the operator's, and a mistake is answered with the key.
#[tokio::test]
async fn configuration_changes_the_verdict() -> Result<()> {
    let component = tools::component("triage")?;
    let mail = sample("30-very-short.eml")?;
    let queue = async |args: &[&str]| {
        let output = triage(&component, args, &mail).await?.success()?;
        let verdict: Value = serde_json::from_str(&output.stdout)?;
        Ok::<_, anyhow::Error>(verdict["queue"].clone())
    };
    assert_eq!(queue(&[]).await?, "inbox");
    assert_eq!(queue(&["--config", "queue.default=helpdesk"]).await?, "helpdesk");
    let last = queue(&["--config", "queue.default=one", "--config", "queue.default=two"]).await?;
    assert_eq!(last, "two", "of a repeated key the last one counts");
    let mistaken = triage(&component, &["--config", "priorty.urgent=fire"], &mail).await?;
    ensure!(mistaken.code() == Some(1) && mistaken.stderr.contains("priorty.urgent"), "{mistaken:?}");
    Ok(())
}

/// The triage that benchmarks run as an ordinary component decides as the lean one does.
#[tokio::test]
async fn the_ordinary_build_gives_the_same_verdicts() -> Result<()> {
    let mut printed = Vec::new();
    for name in ["triage", "triage-ordinary"] {
        let mut args = vec!["triage".into(), tools::component(name)?.into_os_string()];
        args.extend(tools::mails()?.into_iter().map(|mail| mail.into_os_string()));
        printed.push(json_lines(&command::host(args).await?.stdout)?);
    }
    ensure!(printed[0].len() > 30, "hardly any verdicts: {printed:?}");
    assert_eq!(printed[0], printed[1]);
    Ok(())
}

/// An ordinary guest, built with the standard library, runs as it is.
#[tokio::test]
async fn an_ordinary_guest_runs() -> Result<()> {
    let verdict = acted("verdict support high").await?;
    let issue = json!({ "kind": "new", "id": "actor" });
    assert_eq!(verdict, json!({ "priority": "high", "issue": issue, "queue": "support", "reasons": ["actor"] }));
    Ok(())
}

/// A guest finds nothing of the machine it runs on: no environment variables, no arguments, no files.
#[tokio::test]
async fn a_guest_sees_nothing_of_the_machine() -> Result<()> {
    let verdict = acted("environment").await?;
    let reasons: Vec<&str> = verdict["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    assert_eq!(reasons[..2], ["variables: 0", "arguments: 0"]);
    for (reason, place) in reasons[2..].iter().zip(["folder /: ", "file /etc/passwd: "]) {
        ensure!(reason.starts_with(place) && !reason.ends_with("open"), "a file system is there: {reason}");
    }
    Ok(())
}

/// What a guest prints is in the log, line by line with the message it is about, whatever it contains.
#[tokio::test]
async fn what_a_guest_prints_is_logged() -> Result<()> {
    let output = triage(&tools::component("actor")?, &[], "print hello \x1b[31m there".as_bytes()).await?.success()?;
    let lines = json_lines(&output.stderr)?;
    assert_eq!(lines.len(), 2, "standard output and standard error: {lines:?}");
    assert!(!output.stderr.contains('\x1b'), "a terminal must not obey a guest");
    for line in &lines {
        assert_eq!(line["message"], "hello \x1b[31m there");
        assert_eq!(
            (&line["target"], &line["level"], &line["id"]),
            (&json!("guest"), &json!("INFO"), &json!("file:0:triage:1"))
        );
    }
    let off = triage(&tools::component("actor")?, &["--log", "info,guest=off"], b"print hello").await?.success()?;
    assert_eq!(off.stderr, "");
    Ok(())
}

/// A guest that prints without end gets its verdict; the log keeps the beginning and says how much it left out.
#[tokio::test]
async fn a_flood_of_output_is_bounded() -> Result<()> {
    let patient = ["--deadline", "10s", "--host-calls-max", "1000000"];
    let output = triage(&tools::component("actor")?, &patient, b"flood 8").await?.success()?;
    assert_eq!(json_lines(&output.stdout)?[0]["queue"], "flooded");
    ensure!(output.stderr.len() < LOGGED_MAX_BYTES, "{} bytes of log", output.stderr.len());
    let lines = json_lines(&output.stderr)?;
    let last = lines.last().and_then(|line| line["message"].as_str()).unwrap_or_default();
    let left_out: usize = last.split(' ').find_map(|word| word.parse().ok()).with_context(|| last.to_owned())?;
    ensure!(left_out > (7 << 20) && last.contains("more"), "{last}");
    Ok(())
}

/// Whatever breaks a guest off is named as it is in dead letters and metrics, and the next mail is not affected.
#[tokio::test]
async fn a_broken_guest_is_named_by_its_fault() -> Result<()> {
    let folder = crafted::folder()?;
    let cases = [
        ("trap", "trap: "),
        ("unreachable", "trap: "),
        ("loop", "deadline: no answer within 200ms"),
        ("sleep 60000", "deadline: no answer within 200ms"),
        ("allocate 100", "memory: more than 67108864 bytes"),
        ("verdict No.Queue", "output: queue \"No.Queue\""),
        ("reasons 17 1", "output: 17 reasons"),
        ("reject not this one", "rejected: not this one"),
        ("retry", "to be tried again: told to"),
        ("verdict last", ""),
    ];
    for (number, (command, _)) in cases.iter().enumerate() {
        crafted::file(folder.path(), &format!("{number}.eml"), command)?;
    }
    let component = tools::component("actor")?;
    let paths = [component.as_os_str(), folder.path().as_os_str()];
    let flags = ["--json", "--names", "--deadline", "200ms"].map(OsStr::new);
    let output = command::host(["triage".as_ref()].into_iter().chain(paths).chain(flags)).await?;
    assert_eq!(output.code(), Some(1));
    let lines = json_lines(&output.stdout)?;
    assert_eq!(lines.len(), cases.len(), "{lines:?}");
    for ((command, failure), line) in cases.iter().zip(&lines) {
        match line["failure"].as_str() {
            Some(said) => ensure!(!failure.is_empty() && said.starts_with(failure), "{command}: {said}"),
            None => ensure!(failure.is_empty() && line["verdict"]["queue"] == "last", "{command}: {line}"),
        }
    }
    Ok(())
}

/// The commands that `host --help` lists, `help` left out; those of `host dead` as `dead list` and so on.
pub async fn commands() -> Result<Vec<String>> {
    let mut commands = Vec::new();
    for command in commands_of(&[]).await?.context("no list of commands")? {
        match commands_of(&[&command]).await? {
            None => commands.push(command),
            Some(below) => commands.extend(below.into_iter().map(|below| format!("{command} {below}"))),
        }
    }
    ensure!(commands.len() >= 6, "too few commands: {commands:?}");
    Ok(commands)
}

async fn commands_of(words: &[&str]) -> Result<Option<Vec<String>>> {
    let help = command::host(words.iter().chain(&["--help"])).await?.success()?.stdout;
    let Some((_, list)) = help.split_once("Commands:\n") else { return Ok(None) };
    let lines = list.lines().take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
    Ok(Some(names.map(str::to_owned).collect()))
}

/// A shell completes every command.
#[tokio::test]
async fn shells_get_their_completions() -> Result<()> {
    let commands = commands().await?;
    for shell in ["bash", "fish", "zsh"] {
        let script = command::host(["completions", shell]).await?.success()?;
        ensure!(script.stderr.is_empty(), "{shell}: {script:?}");
        for command in &commands {
            let known = command.split(' ').all(|word| script.stdout.contains(word));
            ensure!(known, "{shell} does not complete {command}");
        }
        ensure!(script.stdout.contains("component"), "{shell} does not complete --component");
        if shell == "bash" {
            let check =
                command::run("bash", ["-n"], script.stdout.as_bytes(), Duration::from_secs(60)).await?.success()?;
            ensure!(check.stderr.is_empty(), "{check:?}");
        }
    }
    let unknown = command::host(["completions", "no-shell"]).await?;
    ensure!(unknown.code() == Some(2) && unknown.stderr.contains("bash"), "{unknown:?}");
    Ok(())
}

/// Whoever configures by environment finds each flag's variable in its help, and a variable means the same flag in
/// every command.
#[tokio::test]
async fn help_names_the_variable_of_every_flag() -> Result<()> {
    let mut flags_of: BTreeMap<String, String> = BTreeMap::new();
    let mut without = Vec::new();
    for command in commands().await? {
        let help = command::host(command.split(' ').chain(["--help"])).await?.success()?.stdout;
        for (flag, text) in flags(&help).into_iter().filter(|(flag, _)| flag != "--help") {
            let entry = format!("{command} {flag}");
            let variable = text.split("[env: ").nth(1).and_then(|rest| rest.split(['=', ']']).next());
            match variable {
                Some(variable) => {
                    ensure!(variable.starts_with("MAILROOM_"), "{entry}: {variable}");
                    let known = flags_of.entry(variable.to_owned()).or_insert_with(|| flag.clone());
                    ensure!(*known == flag, "{variable} is {known} and, in {entry}, another flag");
                }
                None => without.push(entry),
            }
            ensure!(text.split_whitespace().count() > 2, "{command} {flag} is not explained: {text}");
        }
    }
    ensure!(flags_of.len() > 40, "found only {} variables: the help is not read right", flags_of.len());
    ensure!(without.is_empty(), "no variable in the help of {}", without.join(", "));
    Ok(())
}

/// The long flags of a help text, each with what is said about it on one line.
fn flags(help: &str) -> Vec<(String, String)> {
    let mut flags: Vec<(String, String)> = Vec::new();
    for line in help.lines() {
        let starts = line.starts_with("      --") || (line.starts_with("  -") && line[4..].starts_with(", --"));
        if starts {
            let name = line[6..].split([' ', '=', '[']).next().unwrap_or_default();
            flags.push((name.to_owned(), String::new()));
        }
        if let Some((_, text)) = flags.last_mut()
            && (starts || line.starts_with("          "))
        {
            text.extend(line.split_whitespace().flat_map(|word| [word, " "]));
        }
    }
    flags
}

/// `host -V` is the version of this source tree; `host --version` names the commit and wasmtime's version too.
#[tokio::test]
async fn the_version_is_this_trees() -> Result<()> {
    command::version(&tools::host()?, "host").await.map(drop)
}

/// A typing error is answered with exit code 2 and the way to help, not with a stack of errors.
#[tokio::test]
async fn wrong_usage_is_exit_code_2() -> Result<()> {
    for args in [
        &["runn"][..],
        &["triage"],
        &["compile"],
        &["inspect", "--wit", "--json", "x"],
        &["provision", "--allow-loss"],
        &["completions"],
        &[],
    ] {
        let output = command::host(args).await?;
        ensure!(output.code() == Some(2) && output.stdout.is_empty(), "{args:?}: {output:?}");
        ensure!(output.stderr.contains("--help") || output.stderr.contains("Commands:"), "{args:?}: {output:?}");
    }
    Ok(())
}

/// A flag that its variable denies is as good as not given.
#[tokio::test]
async fn a_denied_flag_contradicts_nothing() -> Result<()> {
    let (host, actor) = (tools::host()?, tools::component("actor")?);
    let with = async |setting: &str, args: &[&OsStr]| {
        let args = [setting.as_ref(), host.as_os_str()].into_iter().chain(args.iter().copied());
        command::run("/usr/bin/env", args, b"", Duration::from_secs(60)).await
    };
    let wit = with("MAILROOM_JSON=no", &["inspect".as_ref(), "--wit".as_ref(), actor.as_ref()]).await?.success()?;
    ensure!(wit.stdout.contains("export mailroom:triage"), "{wit:?}");
    for (setting, words) in [("MAILROOM_CHECK=0", "--stream"), ("MAILROOM_CHECK=1", "cannot be used with")] {
        let args = ["provision", "--update", "--stream", "no name"].map(OsStr::new);
        let refused = with(setting, &args).await?;
        ensure!(!refused.status.success() && refused.stderr.contains(words), "{setting}: {refused:?}");
    }
    Ok(())
}
