//! Starting: what `host run` refuses, with which words, and what it waits for instead.

use crate::crafted;
use async_nats::jetstream::consumer::{AckPolicy, pull, push};
use std::ffi::OsString;
use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tests::bed::{Bed, SOON};
use tests::prelude::*;

/// Where no NATS server listens: for hosts that have to refuse before they connect.
const NOWHERE: &str = "nats://127.0.0.1:9";

/// Runs `host run`, expects it to end with `code`, and returns the one error it prints.
async fn refused_with<A: Into<OsString>>(code: i32, args: impl IntoIterator<Item = A>) -> Result<String> {
    let args: Vec<OsString> = std::iter::once("run".into()).chain(args.into_iter().map(Into::into)).collect();
    let output = command::run(tools::host()?, &args, b"", SOON).await?;
    ensure!(output.code() == Some(code), "{args:?}: expected exit code {code}: {output:?}");
    ensure!(output.stdout.is_empty(), "{args:?}: printed to standard output: {output:?}");
    let errors: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    ensure!(errors.len() == 1, "{args:?}: expected one error: {output:?}");
    Ok(output.stderr)
}

/// Runs `host run` with this component on no server, and expects an error with all of `words`.
async fn component_refused(component: &Path, words: &[&str]) -> Result<()> {
    let error = refused_with(1, ["--component", &name(component), "--server", NOWHERE, "--listen", "none"]).await?;
    ensure!(error.contains(&name(component)), "the error does not name the file: {error}");
    contains_all(&error, words)
}

/// Runs `host run` with a good component on this server, and expects an error with all of `words`.
async fn server_refused(server: &str, args: &[&str], words: &[&str]) -> Result<String> {
    let component = name(&tools::component("triage")?);
    let fixed = ["--component", &component, "--server", server, "--listen", "none"];
    let error = refused_with(1, fixed.iter().chain(args)).await?;
    contains_all(&error, words)?;
    Ok(error)
}

fn contains_all(error: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(error.contains(word), "the error does not say {word:?}: {error}");
    }
    Ok(())
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// A component file that is missing, is no file or is no component is refused at once, with its name and what is wrong
/// with it.
#[tokio::test]
async fn a_file_that_is_no_component_is_refused() -> Result<()> {
    let folder = crafted::folder()?;
    let folder = folder.path();
    let whole = std::fs::read(tools::component("triage")?)?;
    component_refused(&folder.join("missing.wasm"), &["No such file"]).await?;
    component_refused(folder, &["directory"]).await?;
    let takes = "it takes a .wasm component or a .cwasm";
    component_refused(&crafted::file(folder, "empty.wasm", "")?, &[takes]).await?;
    component_refused(&crafted::file(folder, "text.wasm", "(component)")?, &[takes]).await?;
    component_refused(&crafted::file(folder, "cut.wasm", &whole[..whole.len() / 2])?, &["no valid component"]).await?;
    let mut garbled = whole.clone();
    let middle = whole.len() / 2;
    garbled[middle..middle + 1000].fill(0xff);
    component_refused(&crafted::file(folder, "garbled.wasm", garbled)?, &["no valid component"]).await?;
    Ok(())
}

/// A core module is refused with the command that makes a component of it, and that command does.
#[tokio::test]
async fn a_core_module_is_refused_with_the_way_to_a_component() -> Result<()> {
    let folder = crafted::folder()?;
    let module = crafted::file(folder.path(), "module.wasm", crafted::preview1_module()?)?;
    let remedy = format!("host compile {} --output", name(&module));
    component_refused(&module, &["core module", &remedy]).await?;
    let component = folder.path().join("component.wasm");
    command::host(["compile", &name(&module), "--output", &name(&component)]).await?.success()?;
    let bed = Bed::new().await?;
    let host = Host::on(bed.server.url()).component(component).start().await?;
    host.until_ready(SOON).await
}

/// A component made for something else is refused with what it exports and what to build instead.
#[tokio::test]
async fn a_component_without_the_world_is_refused() -> Result<()> {
    let http = ["mailroom:triage/handler@0.1.0", "wasi:http/incoming-handler", "wasmtime serve"];
    component_refused(&tools::component("triage-http")?, &http).await?;
    let folder = crafted::folder()?;
    let nothing = crafted::file(folder.path(), "nothing.wasm", wat::parse_str("(component)")?)?;
    component_refused(&nothing, &["mailroom:triage/handler@0.1.0", "nothing", "world `triage`"]).await
}

/// What has the right name and the wrong types is refused at start, instead of costing every mail its attempts.
#[tokio::test]
async fn a_handler_of_another_shape_is_refused() -> Result<()> {
    let folder = crafted::folder()?;
    let other = crafted::file(folder.path(), "other.wasm", crafted::guest_of_another_shape()?)?;
    component_refused(&other, &["does not fit the interfaces of this host"]).await?;
    let other = crafted::file(folder.path(), "configured.wasm", crafted::guest_configured_otherwise()?)?;
    component_refused(&other, &["exports mailroom:triage/configured@0.1.0 in another shape"]).await
}

/// While a component is compiled the host connects already, and a signal stops it as at any time.
#[tokio::test]
async fn a_host_that_still_compiles_connects_and_stops() -> Result<()> {
    let folder = crafted::folder()?;
    let large = crafted::guest_of(&long_to_compile(), "package test:crafted; world crafted {}")?;
    let large = crafted::file(folder.path(), "large.wasm", large)?;
    let mut host = Host::on(NOWHERE).component(large).arg("--no-cache").spawn()?;
    host.wait_for_line(SOON, |line| line.contains("trying again in")).await?;
    host.signal(Signal::TERM)?;
    assert_eq!(host.wait(SOON).await?.code(), Some(0));
    host.wait_for_line(SOON, |line| line.contains("SIGTERM: stopping before the component was loaded")).await.map(drop)
}

/// A core module that takes some seconds to compile.
fn long_to_compile() -> String {
    let steps = "local.get 0 i32.const 3 i32.mul local.get 1 i32.xor local.set 0 ".repeat(100);
    let function = format!("(func (param i32 i32) (result i32) {steps} local.get 0)");
    format!("(module {})", function.repeat(4_000))
}

/// A component that wants more than it is granted is refused at start with the import's name and what to do, instead
/// of failing on every mail.
#[tokio::test]
async fn an_import_that_nothing_grants_is_refused_by_name() -> Result<()> {
    let folder = crafted::folder()?;
    for (interface, remedy) in [
        ("wasi:sockets/tcp@0.2.6", "a guest gets no network; build it without"),
        ("wasi:http/outgoing-handler@0.2.6", "which --allow-http https://HOST[:PORT] grants"),
        ("wasi:cli/stdout@0.3.0", "build the guest for wasm32-wasip2"),
        ("acme:cloud/everything@1.0.0", "which nothing provides; build the guest without it"),
    ] {
        let component = crafted::file(folder.path(), "guest.wasm", crafted::guest_importing(interface)?)?;
        component_refused(&component, &[&format!("imports {interface}"), remedy]).await?;
    }
    Ok(())
}

/// A component whose memory starts out larger than allowed is refused with the flag that allows more.
#[tokio::test]
async fn a_component_larger_than_its_memory_limit_is_refused() -> Result<()> {
    server_refused(NOWHERE, &["--memory-max", "64KiB"], &["triage.wasm", "--memory-max"]).await.map(drop)
}

/// Machine code that another version made, or that was cut short on its way, is refused with the command that makes
/// it anew; nothing of it is run.
#[tokio::test]
async fn machine_code_of_another_version_or_cut_short_is_refused() -> Result<()> {
    /// The digests and the words before them that `host compile` puts at the end.
    const TRAILER_BYTES: usize = 80;
    let folder = crafted::folder()?;
    let compiled = folder.path().join("triage.cwasm");
    let component = tools::component("triage")?;
    command::host(["compile", &name(&component), "--output", &name(&compiled)]).await?.success()?;
    let whole = std::fs::read(&compiled)?;
    let (code, trailer) = whole.split_at(whole.len() - TRAILER_BYTES);

    // What wasmtime checks first follows the ELF header: format, length of the version, version.
    let mut other_version = whole.clone();
    let length = usize::from(whole[65]);
    let version = &mut other_version[66..66 + length];
    ensure!(!version.is_empty() && version.iter().all(u8::is_ascii_digit), "no version here: {version:?}");
    version.fill(b'9');
    let hashed = [&other_version[..code.len()], &trailer[TRAILER_BYTES - 32..]].concat();
    other_version[code.len() + 16..][..32].copy_from_slice(blake3::hash(&hashed).as_bytes());

    let mut flipped = whole.clone();
    flipped[code.len() / 2] ^= 1;
    let again = "host compile COMPONENT.wasm";
    for (file, bytes, words) in [
        ("other-version.cwasm", &other_version[..], ["compiled by another version", again]),
        ("no-trailer.cwasm", code, ["cut short", again]),
        ("half.cwasm", &whole[..whole.len() / 2], ["cut short", again]),
        ("short.cwasm", &whole[..TRAILER_BYTES], ["cut short", again]),
        ("half-with-trailer.cwasm", &[&code[..code.len() / 2], trailer].concat(), ["is damaged", again]),
        ("no-code.cwasm", &[&code[..64], trailer].concat(), ["is damaged", again]),
        ("flipped.cwasm", &flipped, ["is damaged", again]),
    ] {
        component_refused(&crafted::file(folder.path(), file, bytes)?, &words).await?;
    }
    Ok(())
}

/// What one start compiled the next one takes from the cache, as long as nobody else can have written it and it is
/// whole; without a cache nothing is kept.
#[tokio::test]
async fn what_was_compiled_is_kept_and_checked() -> Result<()> {
    let folder = crafted::folder()?;
    let cache = folder.path().join("cache");
    let component = tools::component("triage")?;
    let mail = std::fs::read(tools::workspace().join("tests/mails/01-outage.eml"))?;
    // What it says besides its verdict, which is always the same.
    let log = async |args: &[&str]| {
        let (component, cache) = (name(&component), name(&cache));
        let args = [&["triage", &component, "-", "--cache", &cache], args].concat();
        let output = command::run(tools::host()?, &args, &mail, SOON).await?.success()?;
        let verdict: serde_json::Value = serde_json::from_str(&output.stdout)?;
        assert_eq!(verdict["priority"], "urgent", "{output:?}");
        anyhow::Ok(output.stderr)
    };
    let kept = || -> Result<Vec<PathBuf>> {
        let engine = std::fs::read_dir(&cache)?.next().context("a folder of this engine's")??;
        std::fs::read_dir(engine.path())?.map(|entry| Ok(entry?.path())).collect()
    };

    assert_eq!(log(&["--no-cache"]).await?, "");
    ensure!(!cache.exists(), "something is kept");
    let first = log(&[]).await?;
    ensure!(first.contains("kept for the next start"), "{first}");
    let [file] = &kept()?[..] else { bail!("not one file: {:?}", kept()?) };
    assert_eq!(log(&[]).await?, "");

    let whole = std::fs::read(file)?;
    std::fs::remove_file(file)?;
    std::fs::write(file, &whole[1..])?;
    std::fs::set_permissions(file, Permissions::from_mode(0o600))?;
    let damaged = log(&[]).await?;
    ensure!(damaged.contains("is damaged") && damaged.contains("kept for the next start"), "{damaged}");
    assert_eq!(std::fs::read(file)?, whole);

    std::fs::set_permissions(file, Permissions::from_mode(0o666))?;
    let untrusted = log(&[]).await?;
    ensure!(untrusted.contains("kept for the next start"), "{untrusted}");
    assert_eq!(log(&[]).await?, "");

    std::fs::set_permissions(&cache, Permissions::from_mode(0o777))?;
    let open = log(&[]).await?;
    ensure!(open.contains("others may write there") && open.contains("--no-cache"), "{open}");
    std::fs::set_permissions(&cache, Permissions::from_mode(0o700))?;

    // Too small for even one: what was just made stays, what was there before goes.
    let other = crafted::file(folder.path(), "other.wasm", std::fs::read(tools::component("actor")?)?)?;
    command::host(["triage", &name(&other), &name(&other), "--cache", &name(&cache), "--cache-max", "1KiB"]).await?;
    let left = kept()?;
    ensure!(left.len() == 1 && left[0] != *file, "{left:?}");
    Ok(())
}

/// A server without the streams or the consumer is refused with the name of what is missing and the command that
/// makes it; after that command the host starts.
#[tokio::test]
async fn what_is_missing_on_the_server_is_named_with_the_command_that_makes_it() -> Result<()> {
    let server = NatsServer::start().await?;
    let bed = Bed { jetstream: server.jetstream().await?, server, patience: SOON };
    let url = bed.server.url().to_owned();
    server_refused(&url, &[], &["stream MAIL", "`host provision`"]).await?;
    bed.provision(&[]).await?;
    server_refused(&url, &["--stream", "POST"], &["stream POST", "`host provision`"]).await?;
    server_refused(&url, &["--consumer", "eu"], &["consumer eu of stream MAIL", "`host provision`"]).await?;
    bed.jetstream.get_stream(streams::MAIL).await?.delete_consumer("triage").await?;
    server_refused(&url, &[], &["consumer triage of stream MAIL", "`host provision`"]).await?;
    bed.jetstream.delete_stream(streams::VERDICTS).await?;
    bed.provision(&["--check"]).await.expect_err("nothing is missing");
    bed.provision(&[]).await?;
    for (stream, words) in [(streams::VERDICTS, "verdict stream VERDICTS"), (streams::DEAD, "dead-letter stream DEAD")]
    {
        bed.jetstream.delete_stream(stream).await?;
        server_refused(&url, &[], &[words, "`host provision`"]).await?;
        bed.provision(&[]).await?;
    }
    let host = Host::on(&url).start().await?;
    host.until_ready(SOON).await
}

/// A consumer under which mail could be lost or answered twice is refused with the setting and the remedy.
#[tokio::test]
async fn an_unsafe_consumer_is_refused() -> Result<()> {
    let bed = Bed::new().await?;
    let url = bed.server.url().to_owned();
    let stream = bed.jetstream.get_stream(streams::MAIL).await?;
    let durable = || Some("triage".to_owned());
    let anew = "delete it and run `host provision`";

    stream.delete_consumer("triage").await?;
    let deliver_subject = "elsewhere".to_owned();
    stream.create_consumer(push::Config { durable_name: durable(), deliver_subject, ..Default::default() }).await?;
    server_refused(&url, &[], &["consumer triage of stream MAIL", "push consumer", anew]).await?;

    stream.delete_consumer("triage").await?;
    let ack_policy = AckPolicy::None;
    stream.create_consumer(pull::Config { durable_name: durable(), ack_policy, ..Default::default() }).await?;
    server_refused(&url, &[], &["consumer triage of stream MAIL", "ack policy", anew]).await?;

    stream.delete_consumer("triage").await?;
    stream.create_consumer(pull::Config { durable_name: durable(), max_deliver: 3, ..Default::default() }).await?;
    let words = ["consumer triage of stream MAIL", "max_deliver 3", "`host provision --update`"];
    server_refused(&url, &[], &words).await?;

    bed.provision(&["--update"]).await?;
    let words = ["consumer triage of stream MAIL", "ack_wait 30s", "--deadline", "--update --ack-wait 80s`"];
    server_refused(&url, &["--deadline", "40s"], &words).await?;
    bed.provision(&["--update", "--ack-wait", "80s"]).await?;
    let host = Host::on(&url).args(["--deadline", "40s"]).start().await?;
    host.until_ready(SOON).await
}

/// Verdicts that would go before the mail they are about are refused: a mail delivered again would get a second one.
#[tokio::test]
async fn an_unsafe_verdict_stream_is_refused() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = bed.jetstream.get_stream(streams::VERDICTS).await?.cached_info().config.clone();
    config.max_age = Duration::from_secs(3600);
    bed.jetstream.update_stream(&config).await?;
    let words = ["stream VERDICTS keeps verdicts for 1h", "`host provision --update` with `--verdict-max-age 7d`"];
    server_refused(bed.server.url(), &[], &words).await?;
    bed.provision(&["--update", "--verdict-max-age", "7d"]).await?;
    let host = Host::on(bed.server.url()).start().await?;
    host.until_ready(SOON).await
}

/// A server that does not let the host in ends it with the flags to look at, and never shows a secret.
#[tokio::test]
async fn refused_logins_name_the_flag_and_keep_the_secret() -> Result<()> {
    let folder = crafted::folder()?;
    let secret = "s3cr3t-of-the-test";
    let file = name(&crafted::file(folder.path(), "secret", format!("{secret}\n"))?);
    for (authorization, args, words) in [
        ("user: mail, password: room", vec![], ["wants a login", "--creds"]),
        (
            "user: mail, password: room",
            vec!["--user", "mail", "--password-file", &file],
            ["user mail", "--password-file"],
        ),
        ("user: mail, password: room", vec!["--user", "mail", "--password", secret], ["user mail", "--password-file"]),
        ("token: room", vec!["--token-file", &file], ["refuses the token", "--token-file"]),
    ] {
        let extra = format!("authorization {{ {authorization} }}");
        let server = NatsServer::start_with(Settings { extra, ..Settings::default() }).await?;
        let error = server_refused(server.url(), &args, &words).await?;
        ensure!(error.contains(server.url()), "the error does not name the server: {error}");
        ensure!(!error.contains(secret), "the error shows the secret: {error}");
        let with_login = server.url().replace("://", &format!("://mail:{secret}@"));
        if args.is_empty() {
            let error = server_refused(&with_login, &[], &["user mail"]).await?;
            ensure!(!error.contains(secret), "the error shows the secret: {error}");
        }
    }
    Ok(())
}

/// Without JetStream nothing can be stored: the host says so and how to turn it on.
#[tokio::test]
async fn a_server_without_jetstream_is_refused() -> Result<()> {
    let server = NatsServer::start_with(Settings { jetstream: false, ..Settings::default() }).await?;
    server_refused(server.url(), &[], &["no JetStream", "nats-server -js"]).await.map(drop)
}

/// A setting that makes no sense is refused before anything opens, with its flag and what would be right.
#[tokio::test]
async fn flags_that_make_no_sense_are_refused() -> Result<()> {
    let component = name(&tools::component("triage")?);
    let cases: [(i32, &[&str], &[&str]); 22] = [
        (1, &["--slots", "0"], &["--slots 0"]),
        (1, &["--slots", "20001"], &["--slots 20001", "at most"]),
        (1, &["--shards", "0"], &["--shards 0", "one per core"]),
        (1, &["--shards", "4", "--slots", "3"], &["--slots 3", "4 shards"]),
        (1, &["--max-in-flight", "0"], &["--max-in-flight 0", "between"]),
        (1, &["--deadline", "0s"], &["--deadline 0s", "1s is usual"]),
        (1, &["--memory-max", "1KiB"], &["--memory-max", "between 64 KiB"]),
        (1, &["--output-max", "1B"], &["--output-max", "between 1 KiB"]),
        (1, &["--message-max", "0"], &["--message-max 0"]),
        (1, &["--attempts", "0"], &["--attempts 0"]),
        (1, &["--max-deliver", "3"], &["--max-deliver 3", "--attempts 5"]),
        (1, &["--retry-min", "10m"], &["--retry-min", "--retry-max"]),
        (1, &["--config", "no-pair"], &["no-pair", "KEY=VALUE"]),
        (1, &["--config", "=value"], &["=value", "KEY=VALUE"]),
        (1, &["--stream", "a.b"], &["--stream", "a.b"]),
        (1, &["--verdict-stream", "MAIL"], &["--stream", "--verdict-stream", "MAIL"]),
        (1, &["--user", "ann"], &["--user ann", "--password-file"]),
        (1, &["--creds", "/nonexistent/creds"], &["--creds", "/nonexistent/creds"]),
        (2, &["--listen", "nonsense"], &["--listen", "nonsense", "0.0.0.0:9464"]),
        (2, &["--deadline", "soon"], &["--deadline", "soon"]),
        (2, &["--slots", "many"], &["--slots", "many"]),
        (2, &["--no-such-flag"], &["--no-such-flag", "--help"]),
    ];
    for (code, args, words) in cases {
        let error = refused_with(code, ["--component", &component].iter().chain(args)).await?;
        contains_all(&error, words)?;
    }
    let without_component = refused_with(2, ["--listen", "none"]).await?;
    contains_all(&without_component, &["--component"])
}

/// `--dev` brings its own server: naming another one, or a login for one, is a contradiction and not ignored.
#[tokio::test]
async fn dev_and_a_server_contradict_each_other() -> Result<()> {
    let component = name(&tools::component("triage")?);
    for other in [["--server", "nats://example.com"], ["--token", "secret"], ["--creds", "host.creds"]] {
        let error = refused_with(2, ["--component", &component, "--dev"].iter().chain(&other)).await?;
        contains_all(&error, &["--dev", other[0], "cannot be used with"])?;
    }
    Ok(())
}

/// A setting from the environment is checked like one from the command line.
#[tokio::test]
async fn variables_are_checked_as_flags_are() -> Result<()> {
    for (variable, value, code, words) in [
        ("MAILROOM_SLOTS", "0", 1, ["--slots 0", ""]),
        ("MAILROOM_DEADLINE", "soon", 2, ["--deadline", "soon"]),
        ("MAILROOM_LISTEN", "nonsense", 2, ["--listen", "nonsense"]),
        ("MAILROOM_CONFIG", "a=b\nno-pair", 1, ["no-pair", "KEY=VALUE"]),
    ] {
        let component: OsString = tools::component("triage")?.into();
        let run: [OsString; 3] = ["run".into(), "--component".into(), component];
        // `env`, since commands get none of the caller's own settings.
        let setting = OsString::from(format!("{variable}={value}"));
        let args: Vec<OsString> = [setting, tools::host()?.into()].into_iter().chain(run).collect();
        let output = command::run("env", args, b"", SOON).await?;
        ensure!(output.code() == Some(code), "{variable}={value}: {output:?}");
        contains_all(&output.stderr, &words)?;
    }
    Ok(())
}

/// An admin address that another program has is refused with the address and the flag.
#[tokio::test]
async fn a_taken_listen_address_is_refused() -> Result<()> {
    let bed = Bed::new().await?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let component: PathBuf = tools::component("triage")?;
    let args = ["--component", &name(&component), "--server", bed.server.url(), "--listen", &address];
    contains_all(&refused_with(1, args).await?, &[&address, "--listen"])
}

/// More slots than there is room for: the host says so once, and does with what there is.
#[tokio::test]
async fn a_pool_that_does_not_fit_is_smaller() -> Result<()> {
    let bed = Bed::new().await?;
    let limited = ["sh", "-c", "ulimit -v 20971520 && exec \"$0\" \"$@\""];
    let host = Host::on(bed.server.url()).component(tools::component("actor")?).under(limited);
    let mut host = host.args(["--shards", "2", "--slots", "64"]).start().await?;
    host.until_ready(SOON).await?;
    bed.tell(std::iter::repeat_n("sleep 20", 20)).await?;
    bed.one_verdict_each(20).await?;
    assert_eq!(host.metrics().await?.get("mailroom_slots", &[]), Some(3.0));
    assert_eq!(host.stop(SOON).await?.code(), Some(0));
    let log = host.process().lines();
    let said: Vec<_> = log.iter().filter(|line| line.contains("there is room for")).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    contains_all(said[0], &["WARN", "3 slots instead of 64", "ulimit -v"])
}

/// A host started before its server waits, says so in its log and on `/readyz`, and works as soon as there is one.
#[tokio::test]
async fn a_host_waits_for_its_server_and_becomes_ready() -> Result<()> {
    let mut bed = Bed::new().await?;
    bed.server.stop().await?;
    let host = Host::on(bed.server.url()).component(tools::component("actor")?).start().await?;
    let line = host.wait_for_line(SOON, |line| line.contains("trying again")).await?;
    ensure!(line.contains(bed.server.url()) && line.contains("WARN"), "{line}");
    let (status, body) = host.ready().await?;
    assert_eq!(status, 503);
    ensure!(body.lines().any(|line| line == "no connection to NATS"), "{body}");
    let live = http::get(&format!("{}/livez", host.admin())).await?;
    assert_eq!(live.status, 200, "a host that waits must not be restarted for it");

    bed.server.restart().await?;
    host.until_ready(SOON).await?;
    bed.jetstream = bed.server.jetstream().await?;
    bed.tell(["verdict support"]).await?;
    bed.one_verdict_each(1).await
}

/// A host that still waits for its server stops when told to, with exit code 0, like any other.
#[tokio::test]
async fn sigterm_while_waiting_for_the_server_is_no_failure() -> Result<()> {
    let mut server = NatsServer::start().await?;
    server.stop().await?;
    for signal in [Signal::TERM, Signal::INT] {
        let mut host = Host::on(server.url()).start().await?;
        host.wait_for_line(SOON, |line| line.contains("trying again")).await?;
        host.signal(signal)?;
        assert_eq!(host.wait(SOON).await?.code(), Some(0), "{signal:?}");
    }
    Ok(())
}

/// A server that comes up without the streams ends a host that waited for it, with what is missing.
#[tokio::test]
async fn a_late_server_without_streams_is_refused_too() -> Result<()> {
    let mut server = NatsServer::start().await?;
    server.stop().await?;
    let mut host = Host::on(server.url()).start().await?;
    host.wait_for_line(SOON, |line| line.contains("trying again")).await?;
    server.restart().await?;
    let line = host.wait_for_line(SOON, |line| line.starts_with("error: ")).await?;
    contains_all(&line, &["stream MAIL", "`host provision`"])?;
    assert_eq!(host.wait(SOON).await?.code(), Some(1));
    Ok(())
}
