//! `host provision`: creates or checks the streams, the consumer and the bucket that the host works with.
//!
//! Settings are compared and changed as the JSON that the server speaks, one by one, so that a setting this program
//! has never heard of survives an update.

use crate::cli::counted;
use crate::layout::{Layout, LayoutArgs, Server, Setting, Wanted, as_typed, show_size, unsafe_settings};
use crate::names::{NameArgs, covers, overlap};
use crate::nats::{NatsArgs, check_jetstream, warn_if_refused};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{Context, ErrorCode, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fmt::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// How long the server may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Create or check the streams, the consumer and the key-value bucket
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host provision                        create what is missing, with the defaults
  host provision --check                change nothing; exit code 1 if not all is as wanted
  host provision --update --ack-wait 1m change this setting of what exists, and no other
  host provision --stream ORDERS --subjects 'orders.>' --consumer triage-eu

What exists keeps every setting that no flag or variable is given for; the defaults are for what is
created. Without --update a difference is shown and left alone.")]
pub struct ProvisionArgs {
    #[command(flatten)]
    nats: NatsArgs,

    #[command(flatten)]
    names: NameArgs,

    #[command(flatten)]
    layout: LayoutArgs,

    /// Change nothing; exit with code 1 if anything is missing or differs
    #[arg(long, env = "MAILROOM_CHECK", value_parser = clap::builder::BoolishValueParser::new(), conflicts_with = "update", help_heading = "Mode")]
    check: bool,

    /// Bring what exists and differs to the settings that are given
    #[arg(long, env = "MAILROOM_UPDATE", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    update: bool,

    /// With --update: make a stream smaller though the server deletes messages then, verdicts or dead letters
    #[arg(long, env = "MAILROOM_ALLOW_LOSS", value_parser = clap::builder::BoolishValueParser::new(), requires = "update", help_heading = "Mode")]
    allow_loss: bool,

    /// Print the report as JSON
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    json: bool,
}

impl ProvisionArgs {
    /// Connects, does what was asked and prints the report.
    ///
    /// # Errors
    /// No connection, no JetStream, settings that are refused. What merely differs is in the report and the exit
    /// code.
    pub async fn execute(self) -> Result<ExitCode> {
        let layout = self.layout.resolve(self.names.resolve()?)?;
        let nats = self.nats.resolve()?;
        let mode = match (self.check, self.update, self.allow_loss) {
            (true, _, _) => Mode::Check,
            (_, true, allow_loss) => Mode::Update { allow_loss },
            _ => Mode::Create,
        };
        let client = nats.connect("mailroom provision", warn_if_refused()).await?;
        let jetstream = nats.jetstream(client, REQUEST_TIMEOUT);
        let report = provision(&jetstream, &layout, mode).await?;
        let text = if self.json { serde_json::to_string(&report)? + "\n" } else { report.to_string() };
        crate::cli::print(&text)?;
        if !report.unsafe_settings.is_empty() {
            bail!("{}", report.unsafe_settings.join("\n       "));
        }
        Ok(if mode == Mode::Check && !report.as_wanted() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// What [`provision`] may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Create what is missing, leave what differs.
    Create,
    /// Create what is missing, change what differs; make a stream too small for what it holds only if that is allowed.
    Update { allow_loss: bool },
    /// Only look.
    Check,
}

/// What [`provision`] found and did.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The streams, the consumer and the bucket, in the order they were looked at.
    pub things: Vec<Thing>,
    /// What must be changed before `host run` may use this; empty if nothing, or if something is missing.
    #[serde(rename = "unsafe")]
    pub unsafe_settings: Vec<String>,
}

/// One stream, consumer or bucket.
#[derive(Debug, Serialize)]
pub struct Thing {
    /// `stream`, `consumer` or `bucket`.
    pub kind: &'static str,
    /// Its name; a consumer's with its stream: `MAIL/triage`.
    pub name: String,
    /// What it is like now.
    pub state: State,
    /// What differs, or differed before an update.
    pub differences: Vec<Difference>,
    /// What it is for, in a few words.
    pub about: String,
}

/// How a thing compares with what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It was missing and is there now.
    Created,
    /// It is there, with the settings asked for.
    AsWanted,
    /// It is there, with other settings.
    Differs,
    /// It is not there.
    Missing,
    /// It had other settings and now has the ones asked for.
    Updated,
}

/// A setting that is not as asked for.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// The setting, as NATS calls it.
    pub setting: &'static str,
    /// What the server has.
    pub have: String,
    /// What was asked for.
    pub want: String,
}

impl Report {
    /// Whether everything is there and as asked for.
    pub fn as_wanted(&self) -> bool {
        self.things.iter().all(|thing| !matches!(thing.state, State::Missing | State::Differs))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::AsWanted => "as wanted",
            Self::Differs => "differs",
            Self::Missing => "missing",
            Self::Updated => "updated",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.things.iter().map(|thing| thing.name.chars().count()).max().unwrap_or(0);
        for thing in &self.things {
            let mut lines = thing.differences.iter().map(|difference| {
                let Difference { setting, have, want } = difference;
                let verb = if thing.state == State::Updated { ("was", "is") } else { ("have", "want") };
                format!("{setting}: {} {have}, {} {want}", verb.0, verb.1)
            });
            let first = lines.next().unwrap_or_else(|| thing.about.clone());
            writeln!(f, "{:<8}  {:<width$}  {:<9}  {first}", thing.kind, thing.name, thing.state)?;
            for line in lines {
                writeln!(f, "{:<8}  {:<width$}  {:<9}  {line}", "", "", "")?;
            }
        }
        let has = |state| self.things.iter().any(|thing| thing.state == state);
        if has(State::Differs) {
            writeln!(f, "\nWhat differs was left alone; the same with --update changes it.")?;
        }
        if has(State::Missing) {
            writeln!(f, "\nNothing was created; `host provision` without --check does that.")?;
        }
        Ok(())
    }
}

/// Creates, updates or checks everything in `layout`.
///
/// Doing it twice changes nothing the second time. No stream is ever deleted, nor a message unless that is allowed.
///
/// # Errors
/// Settings that contradict each other, what would become unsafe or lose messages, no JetStream, whatever the server
/// refuses. What was done before stays; run it again. Existing settings that are unsafe are no error here but in the
/// report.
pub async fn provision(jetstream: &Context, layout: &Layout, mode: Mode) -> Result<Report> {
    layout.check()?;
    check_jetstream(jetstream).await?;
    let server = Server {
        many_filters: jetstream.client().is_server_compatible(2, 10, 0),
        schedules: jetstream.client().is_server_compatible(2, 12, 0),
    };
    let mut plans = Vec::new();
    for wanted in Wanted::all(layout, server) {
        let found = wanted.find(jetstream).await.with_context(|| format!("look for {}", wanted.what()))?;
        plans.push(wanted.plan(found, mode));
    }
    if plans.iter().any(|plan| plan.action != Action::None) {
        let wrong = unsafe_plan(&plans, layout)?;
        ensure!(wrong.is_empty(), "nothing was changed, since this would be unsafe: {}", wrong.join("; "));
        for plan in &plans {
            plan.check(mode)?;
        }
    }
    let mut report = Report { things: Vec::new(), unsafe_settings: Vec::new() };
    for plan in &mut plans {
        report.things.push(plan.carry_out(jetstream).await?);
    }
    report.unsafe_settings = unsafe_plan(&plans, layout)?;
    Ok(report)
}

/// What keeps a host from working safely with this, if all is there that it takes.
fn unsafe_plan(plans: &[Plan], layout: &Layout) -> Result<Vec<String>> {
    // In the order of `Wanted::all`.
    let [_, mail, consumer, verdicts, ..] = plans else { return Ok(Vec::new()) };
    let config = |plan: &Plan| plan.config.clone().map(Value::Object);
    let (Some(mail), Some(consumer), Some(verdicts)) = (config(mail), config(consumer), config(verdicts)) else {
        return Ok(Vec::new());
    };
    let read = "read the server's answer";
    let mail: stream::Config = serde_json::from_value(mail).context(read)?;
    let mut wrong = unsafe_settings(
        &mail,
        &serde_json::from_value(consumer).context(read)?,
        &serde_json::from_value(verdicts).context(read)?,
        layout.deadline,
    );
    if let Some(filter) = &layout.filter
        && !mail.subjects.iter().any(|subject| overlap(subject, filter))
    {
        wrong.push(format!(
            "--filter {filter} matches none of the subjects {} of stream {}; the consumer would get nothing",
            mail.subjects.join(", "),
            mail.name
        ));
    }
    Ok(wrong)
}

impl Wanted {
    /// What it is, for messages.
    fn what(&self) -> String {
        format!("{} {}", self.kind, self.shown_name)
    }

    /// What to do about it, if this is what is there.
    fn plan(mut self, found: Option<Found>, mode: Mode) -> Plan {
        let Some(found) = found else {
            let config = self.settings.iter().filter(|setting| !is_default(&setting.value));
            let config = config.map(|setting| (setting.name.to_owned(), setting.value.clone())).collect();
            let (action, config) =
                if mode == Mode::Check { (Action::None, None) } else { (Action::Create, Some(config)) };
            return Plan { wanted: self, found: None, differences: Vec::new(), action, config };
        };
        self.must_take(&found.config);
        self.must_source(&found.config);
        let differences = differences(&found.config, &self.settings);
        let mut config = found.config.clone();
        let mut action = Action::None;
        if !differences.is_empty() && matches!(mode, Mode::Update { .. }) {
            action = Action::Update;
            for Setting { name, value, .. } in self.settings.iter().filter(|setting| setting.lasting) {
                if is_default(value) {
                    config.remove(*name);
                } else {
                    config.insert((*name).to_owned(), value.clone());
                }
            }
        }
        Plan { wanted: self, found: Some(found), differences, action, config: Some(config) }
    }

    /// Makes what `have` lacks of [`Wanted::must_take`] a lasting setting, where no flag says otherwise. A consumer
    /// without a filter lacks nothing.
    fn must_take(&mut self, have: &Map<String, Value>) {
        let (name, mut taken) = match &self.of_stream {
            None => ("subjects", texts(have, "subjects")),
            Some(_) => ("filter_subjects", filters(have)),
        };
        let is_given = self.settings.iter().any(|setting| setting.name == name && setting.lasting);
        let unfiltered = self.of_stream.is_some() && taken.is_empty();
        let missing: Vec<_> =
            self.must_take.iter().filter(|one| !taken.iter().any(|other| covers(other, one))).collect();
        if is_given || unfiltered || missing.is_empty() {
            return;
        }
        taken.extend(missing.into_iter().cloned());
        taken.sort();
        for setting in &mut self.settings {
            if setting.name == name {
                (setting.value, setting.lasting) = (json!(taken), true);
            } else if setting.name == "filter_subject" {
                (setting.value, setting.lasting) = (json!(""), true);
            }
        }
    }

    /// Makes what `have` lacks of [`Wanted::must_source`] a lasting setting, beside the sources that are there.
    fn must_source(&mut self, have: &Map<String, Value>) {
        let Some(source) = &self.must_source else { return };
        let mut sources = have.get("sources").and_then(Value::as_array).cloned().unwrap_or_default();
        let has = |other: &Value| {
            other["name"] == source["name"] && other["subject_transforms"] == source["subject_transforms"]
        };
        if !sources.iter().any(has) {
            sources.retain(|other| other["name"] != source["name"]);
            sources.push(source.clone());
            for setting in self.settings.iter_mut().filter(|setting| setting.name == "sources") {
                (setting.value, setting.lasting) = (json!(sources), true);
            }
        }
    }

    async fn find(&self, jetstream: &Context) -> Result<Option<Found>> {
        match jetstream.request::<_, _, Response<Value>>(self.info.clone(), &json!({})).await? {
            Response::Ok(mut info) => {
                // A consumer has none of this.
                let state = serde_json::from_value(info["state"].take()).unwrap_or_default();
                Ok(Some(Found { config: config_of(info)?, state }))
            }
            Response::Err { error }
                if matches!(error.error_code(), ErrorCode::STREAM_NOT_FOUND | ErrorCode::CONSUMER_NOT_FOUND) =>
            {
                Ok(None)
            }
            Response::Err { error } => bail!("{error}"),
        }
    }

    async fn send(
        &self,
        jetstream: &Context,
        subject: &str,
        config: &Map<String, Value>,
    ) -> Result<Map<String, Value>> {
        let (request, filter) = match &self.of_stream {
            Some(stream) => (
                json!({ "stream_name": stream, "config": config }),
                config.get("filter_subject").and_then(Value::as_str),
            ),
            None => (json!(config), None),
        };
        // The server wants the filter in the request's subject as well.
        let subject = filter.map_or_else(|| subject.to_owned(), |filter| format!("{subject}.{filter}"));
        match jetstream.request(subject, &request).await? {
            Response::Ok(info) => config_of(info),
            Response::Err { error } => Err(match error.error_code() {
                ErrorCode::STREAM_SUBJECT_OVERLAP => self.overlap(jetstream, &texts(config, "subjects")).await,
                ErrorCode::STREAM_MAX_BYTES_REQUIRED => {
                    anyhow!("this account wants a size limit on every stream; give the --…-max-bytes flags")
                }
                ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED => {
                    anyhow!("the server is not part of a cluster; use --replicas 1 ({error})")
                }
                ErrorCode::CONSUMER_MAX_PENDING_ACK_EXCESS => {
                    anyhow!("--max-ack-pending is more than the server allows: {error}")
                }
                ErrorCode::STORAGE_RESOURCES_EXCEEDED | ErrorCode::MEMORY_RESOURCES_EXCEEDED => {
                    anyhow!(
                        "the account's or server's storage does not suffice; lower the --…-max-bytes flags ({error})"
                    )
                }
                _ => anyhow!("{error}"),
            }),
        }
    }

    /// Names the streams that already take our subjects; the server does not.
    async fn overlap(&self, jetstream: &Context, subjects: &[String]) -> anyhow::Error {
        let mut others = Vec::new();
        for subject in subjects {
            let request = json!({ "subject": subject });
            let Ok(Response::Ok(page)) = jetstream.request::<_, _, Response<Value>>("STREAM.NAMES", &request).await
            else {
                continue;
            };
            let names = page["streams"].as_array().into_iter().flatten().filter_map(Value::as_str);
            others.extend(names.filter(|name| *name != self.shown_name).map(str::to_owned));
        }
        others.dedup();
        let others = if others.is_empty() { "another stream".into() } else { format!("stream {}", others.join(", ")) };
        anyhow!(
            "{others} already takes some of the subjects {}; a subject can be in one stream only: choose others, or \
             name that stream with --stream, --verdict-stream or --dead-stream",
            subjects.join(", ")
        )
    }
}

/// What is there.
struct Found {
    config: Map<String, Value>,
    state: Stock,
}

/// What a stream holds.
#[derive(Default, Deserialize)]
struct Stock {
    messages: u64,
    bytes: u64,
    /// When the oldest message was stored, RFC 3339.
    first_ts: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    None,
    Create,
    Update,
}

/// What is to be done about a thing.
struct Plan {
    wanted: Wanted,
    found: Option<Found>,
    differences: Vec<Difference>,
    action: Action,
    /// The configuration that is there when it is done; nothing, if it is missing then.
    config: Option<Map<String, Value>>,
}

impl Plan {
    /// Checks a stream's new limits.
    ///
    /// # Errors
    /// They contradict each other, or the server would delete messages to keep them and that is not allowed.
    fn check(&self, mode: Mode) -> Result<()> {
        let (Some(config), false) = (&self.config, self.action == Action::None) else { return Ok(()) };
        let what = self.wanted.what();
        let time = |config: &Map<String, Value>, name: &str| {
            Some(Duration::from_nanos(config.get(name)?.as_u64()?)).filter(|time| !time.is_zero())
        };
        let flag = |name: &str| {
            let setting = self.wanted.settings.iter().find(|setting| setting.name == name);
            setting.map_or("", |setting| setting.flag)
        };
        let max_age = time(config, "max_age");
        if let (Some(max_age), Some(window)) = (max_age, time(config, "duplicate_window")) {
            ensure!(
                max_age >= window,
                "{what}: {} {} must be at least --duplicate-window {}",
                flag("max_age"),
                as_typed(max_age),
                as_typed(window)
            );
        }
        let Some(Found { config: have, state: Stock { messages, bytes, first_ts } }) = &self.found else {
            return Ok(());
        };
        if mode == (Mode::Update { allow_loss: true }) || *messages == 0 {
            return Ok(());
        }
        let max_bytes = |config: &Map<String, Value>| config.get("max_bytes").and_then(Value::as_u64);
        if let Some(max_bytes) = max_bytes(config).filter(|max| max_bytes(have) != Some(*max) && max < bytes) {
            bail!(
                "{what} holds {} of {}: to keep {} {}, the server would delete the oldest; \
                 nothing was changed; give at least what it holds, or --allow-loss as well",
                counted(*messages, "message"),
                counted(*bytes, "byte"),
                flag("max_bytes"),
                show_size(max_bytes)
            );
        }
        if let Some(max_age) = max_age.filter(|max| time(have, "max_age").is_none_or(|have| *max < have)) {
            let oldest = humantime::parse_rfc3339(first_ts).with_context(|| format!("read the time {first_ts}"))?;
            ensure!(
                SystemTime::now().duration_since(oldest).unwrap_or_default() <= max_age,
                "{what} holds {}, the oldest since {first_ts}: to keep {} {}, the server would delete \
                 what is older; nothing was changed; give a longer time, or --allow-loss as well",
                counted(*messages, "message"),
                flag("max_age"),
                as_typed(max_age)
            );
        }
        Ok(())
    }

    /// Does it, and says what was done.
    async fn carry_out(&mut self, jetstream: &Context) -> Result<Thing> {
        let (wanted, what) = (&self.wanted, self.wanted.what());
        let state = match (self.action, &mut self.config) {
            (Action::Create, Some(config)) => {
                *config =
                    wanted.send(jetstream, &wanted.create, config).await.with_context(|| format!("create {what}"))?;
                State::Created
            }
            (Action::Update, Some(config)) => {
                *config = wanted.send(jetstream, &wanted.update, config).await.with_context(|| {
                    let names: Vec<_> = self.differences.iter().map(|difference| difference.setting).collect();
                    format!(
                        "update {what} ({}); a setting that cannot change needs a new {}",
                        names.join(", "),
                        wanted.kind
                    )
                })?;
                State::Updated
            }
            (_, None) => State::Missing,
            _ if self.differences.is_empty() => State::AsWanted,
            _ => State::Differs,
        };
        let differences = std::mem::take(&mut self.differences);
        Ok(Thing { kind: wanted.kind, name: wanted.shown_name.clone(), state, differences, about: self.about() })
    }

    /// What the thing is for, in a few words: the subjects it takes.
    fn about(&self) -> String {
        let Some(config) = &self.config else { return self.wanted.about.unwrap_or_default().to_owned() };
        let subjects = match (self.wanted.about, &self.wanted.of_stream) {
            (Some(about), _) => return about.to_owned(),
            (None, None) => texts(config, "subjects"),
            (None, Some(_)) => {
                let mut filters = filters(config);
                filters.retain(|filter| !self.wanted.must_take.contains(filter));
                filters
            }
        };
        if subjects.is_empty() { "all of the stream".into() } else { subjects.join(", ") }
    }
}

/// The texts in a list of a configuration, sorted.
fn texts(config: &Map<String, Value>, name: &str) -> Vec<String> {
    let texts = config.get(name).and_then(Value::as_array).into_iter().flatten();
    let mut texts: Vec<_> = texts.filter_map(Value::as_str).map(str::to_owned).collect();
    texts.sort();
    texts
}

/// A consumer's filters, of either kind.
fn filters(config: &Map<String, Value>) -> Vec<String> {
    let mut filters = texts(config, "filter_subjects");
    let filter = config.get("filter_subject").and_then(Value::as_str);
    filters.extend(filter.filter(|filter| !filter.is_empty()).map(str::to_owned));
    filters
}

fn config_of(info: Value) -> Result<Map<String, Value>> {
    match info {
        Value::Object(mut info) => match info.remove("config") {
            Some(Value::Object(config)) => Ok(config),
            _ => bail!("the server's answer has no configuration"),
        },
        _ => bail!("the server's answer is no object"),
    }
}

fn differences(have: &Map<String, Value>, want: &[Setting]) -> Vec<Difference> {
    let mut found = Vec::new();
    for Setting { name, value: want, .. } in want.iter().filter(|setting| setting.lasting) {
        let have = match *name {
            "subjects" | "filter_subjects" => json!(texts(have, name)),
            _ => have.get(*name).cloned().unwrap_or(Value::Null),
        };
        if have != *want && !(is_default(&have) && is_default(want)) {
            found.push(Difference { setting: name, have: show_value(name, &have), want: show_value(name, want) });
        }
    }
    found
}

/// Whether the server leaves such a value out of its answers. A limit of -1 is one it does not leave out.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_u64() == Some(0),
        Value::String(value) => value.is_empty(),
        Value::Array(value) => value.is_empty(),
        Value::Object(value) => value.is_empty(),
    }
}

fn show_value(setting: &str, value: &Value) -> String {
    match (setting, value) {
        ("max_age", value) if is_default(value) => "for ever".into(),
        ("max_age" | "ack_wait" | "duplicate_window" | "inactive_threshold", Value::Number(nanos)) => {
            humantime::format_duration(Duration::from_nanos(nanos.as_u64().unwrap_or(0))).to_string()
        }
        ("max_bytes", Value::Number(bytes)) => bytes.as_u64().map_or("no limit".into(), show_size),
        ("headers_only" | "allow_rollup_hdrs" | "deny_delete" | "allow_msg_schedules", Value::Null) => "false".into(),
        (_, value) if is_default(value) => "none".into(),
        ("sources", Value::Array(sources)) => {
            sources.iter().filter_map(|source| source["name"].as_str()).collect::<Vec<_>>().join(", ")
        }
        (_, Value::String(text)) => text.clone(),
        (_, Value::Array(items)) => {
            let mut text = String::new();
            for item in items {
                let comma = if text.is_empty() { "" } else { ", " };
                let _ = write!(text, "{comma}{}", item.as_str().map_or_else(|| item.to_string(), str::to_owned));
            }
            text
        }
        (_, value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{limit, nanos};
    use crate::names::Names;

    /// One that can all of it.
    const NEW: Server = Server { many_filters: true, schedules: true };

    #[test]
    fn a_source_is_added_to_those_that_a_stream_has() {
        let ours = json!({
            "name": "PARKED", "subject_transforms": [{ "src": "parked.due.MAIL.>", "dest": "replay.MAIL.>" }]
        });
        let other = json!({ "name": "OTHER", "filter_subject": "mail.>" });
        let wrong = json!({ "name": "PARKED" });
        for (have, expected) in [
            (json!({}), Some(json!([ours]))),
            (json!({ "sources": [other, ours] }), None),
            (json!({ "sources": [other] }), Some(json!([other, ours]))),
            (json!({ "sources": [wrong, other] }), Some(json!([other, ours]))),
        ] {
            let mut mail = Wanted::all(&Layout::new(Names::default()), NEW).swap_remove(1);
            mail.must_source(have.as_object().expect("an object"));
            let sources = mail.settings.iter().find(|setting| setting.name == "sources").expect("sources");
            assert_eq!(sources.lasting.then_some(&sources.value), expected.as_ref(), "{have}");
        }
    }

    #[test]
    fn replays_are_added_to_what_a_stream_and_a_filter_take() {
        type Case = (usize, Value, Option<(&'static str, Value)>);
        let replays = "replay.MAIL.triage.>";
        let cases: [Case; 8] = [
            (1, json!({ "subjects": ["orders.>"] }), Some(("subjects", json!(["orders.>", "replay.MAIL.>"])))),
            (1, json!({ "subjects": ["replay.>", "orders.>"] }), None),
            (3, json!({ "subjects": ["verdict.>", "more"] }), None),
            (3, json!({ "subjects": ["v"] }), Some(("subjects", json!(["v", "verdict.>"])))),
            (2, json!({}), None),
            (2, json!({ "filter_subject": "mail.a" }), Some(("filter_subjects", json!(["mail.a", replays])))),
            (2, json!({ "filter_subjects": [">"] }), None),
            (2, json!({ "filter_subjects": ["b", "a"] }), Some(("filter_subjects", json!(["a", "b", replays])))),
        ];
        for (number, have, expected) in cases {
            let mut wanted = Wanted::all(&Layout::new(Names::default()), NEW).swap_remove(number);
            wanted.must_take(have.as_object().expect("an object"));
            let mut lists = wanted.settings.iter().filter(|setting| setting.lasting && setting.value.is_array());
            let found = lists.find(|setting| setting.name != "backoff").map(|setting| (setting.name, &setting.value));
            assert_eq!(found, expected.as_ref().map(|(name, value)| (*name, value)), "{have}");
        }
    }

    #[test]
    fn only_real_differences_count() {
        let have = json!({
            "subjects": ["b", "a"], "max_age": 604_800_000_000_000_u64, "max_bytes": -1, "discard": "old", "filter_subject": "x"
        });
        let want = [
            ("subjects", json!(["a", "b"])),
            ("max_age", nanos(Duration::from_secs(24 * 60 * 60))),
            ("max_bytes", limit(0)),
            ("discard", json!("new")),
            ("backoff", json!([])),
            ("filter_subject", json!("")),
            ("allow_rollup_hdrs", json!(true)),
        ];
        let want = want.map(|(name, value)| Setting::always(name, value));
        let found: Vec<String> = differences(have.as_object().expect("object"), &want)
            .into_iter()
            .map(|Difference { setting, have, want }| format!("{setting} {have} {want}"))
            .collect();
        assert_eq!(
            found,
            ["max_age 7days 1day", "discard old new", "filter_subject x none", "allow_rollup_hdrs false true"]
        );
    }
}
