//! `host provision`: creates or checks the streams, the consumer and the bucket that the host works with.
//!
//! Settings are compared and changed as the JSON that the server speaks, one by one, so that a setting this program
//! has never heard of survives an update.

use crate::names::{NameArgs, Names, check_name, check_pattern, overlap};
use crate::nats::{NatsArgs, check_jetstream, warn_if_refused};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{Context, ErrorCode, consumer, stream};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

/// How long the server may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What to create, as typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  host provision                        create what is missing, with the defaults
  host provision --check                change nothing; exit code 1 if not all is as wanted
  host provision --update --ack-wait 1m bring what exists to these settings
  host provision --stream ORDERS --subjects 'orders.>' --consumer triage-eu

Existing streams keep settings that are not listed here. Without --update a difference is shown and left alone.")]
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

    /// Bring what exists and differs to these settings
    #[arg(long, env = "MAILROOM_UPDATE", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    update: bool,

    /// Print the report as JSON
    #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Mode")]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Settings")]
struct LayoutArgs {
    /// Subjects that the stream takes; separate several with commas or repeat the flag
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_SUBJECTS", value_delimiter = ',', default_value = "mail.>")]
    subjects: Vec<String>,

    /// Give the consumer only the messages on this subject [default: all of the stream]
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_FILTER")]
    filter: Option<String>,

    /// Key-value bucket for guests
    #[arg(long, value_name = "NAME", env = "MAILROOM_BUCKET", default_value = "triage")]
    bucket: String,

    /// Create no key-value bucket
    #[arg(long, env = "MAILROOM_NO_BUCKET", value_parser = clap::builder::BoolishValueParser::new())]
    no_bucket: bool,

    /// How long a message may stay unacknowledged before the server delivers it again. Must be longer than the
    /// deadline; the host extends it while a guest runs
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_ACK_WAIT",
        default_value = "30s",
        value_parser = humantime::parse_duration
    )]
    ack_wait: Duration,

    /// The deadline of `host run`, to check --ack-wait against
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DEADLINE",
        default_value = "1s",
        value_parser = humantime::parse_duration
    )]
    deadline: Duration,

    /// How long the streams recognise a message id they have seen
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DUPLICATE_WINDOW",
        default_value = "2m",
        value_parser = humantime::parse_duration
    )]
    duplicate_window: Duration,

    /// Messages that all hosts together may hold unacknowledged; those waiting for another attempt count too
    #[arg(
        long,
        value_name = "NUMBER",
        env = "MAILROOM_MAX_ACK_PENDING",
        default_value_t = 20_000,
        value_parser = clap::value_parser!(i64).range(1..)
    )]
    max_ack_pending: i64,

    /// How long messages are kept, triaged or not; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_MAIL_MAX_AGE",
        default_value = "7d",
        value_parser = parse_age
    )]
    mail_max_age: Duration,

    /// How long verdicts are kept: at least as long as messages; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_VERDICT_MAX_AGE",
        default_value = "7d",
        value_parser = parse_age
    )]
    verdict_max_age: Duration,

    /// How long dead letters are kept; 0: for ever
    #[arg(
        long,
        value_name = "DURATION",
        env = "MAILROOM_DEAD_MAX_AGE",
        default_value = "0",
        value_parser = parse_age
    )]
    dead_max_age: Duration,

    /// Largest size of the message stream, such as 10GiB; when it is full, publishers are refused. 0: no limit
    #[arg(long, value_name = "SIZE", env = "MAILROOM_MAIL_MAX_BYTES", default_value = "0", value_parser = parse_size)]
    mail_max_bytes: u64,

    /// Largest size of the verdict stream; when it is full, the host waits. 0: no limit
    #[arg(
        long,
        value_name = "SIZE",
        env = "MAILROOM_VERDICT_MAX_BYTES",
        default_value = "0",
        value_parser = parse_size
    )]
    verdict_max_bytes: u64,

    /// Largest size of the dead-letter stream; when it is full, its messages stay where they are. 0: no limit
    #[arg(long, value_name = "SIZE", env = "MAILROOM_DEAD_MAX_BYTES", default_value = "0", value_parser = parse_size)]
    dead_max_bytes: u64,

    /// Largest size of the bucket; when it is full, guests' writes fail. 0: no limit
    #[arg(
        long,
        value_name = "SIZE",
        env = "MAILROOM_BUCKET_MAX_BYTES",
        default_value = "0",
        value_parser = parse_size
    )]
    bucket_max_bytes: u64,

    /// Where the server keeps all of it; memory is lost when the server stops
    #[arg(long, env = "MAILROOM_STORAGE", default_value = "file")]
    storage: Storage,

    /// Servers of a cluster that each keep a copy
    #[arg(
        long,
        value_name = "NUMBER",
        env = "MAILROOM_REPLICAS",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=5)
    )]
    replicas: u8,
}

/// Where the server keeps a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// On disk
    File,
    /// In memory
    Memory,
}

/// What should be there, as meant.
#[derive(Debug, Clone)]
pub struct Layout {
    /// What everything is called.
    pub names: Names,
    /// Subjects of the message stream.
    pub subjects: Vec<String>,
    /// The consumer's filter; `None` for all of the stream.
    pub filter: Option<String>,
    /// The guests' bucket; `None` for none.
    pub bucket: Option<String>,
    /// When the server delivers an unacknowledged message again.
    pub ack_wait: Duration,
    /// The most a guest may take.
    pub deadline: Duration,
    /// How long the streams recognise message ids.
    pub duplicate_window: Duration,
    /// Unacknowledged messages of all hosts together.
    pub max_ack_pending: i64,
    /// How long messages are kept; zero for ever.
    pub mail_max_age: Duration,
    /// How long verdicts are kept; zero for ever.
    pub verdict_max_age: Duration,
    /// How long dead letters are kept; zero for ever.
    pub dead_max_age: Duration,
    /// Size limits of mail, verdicts, dead letters and bucket, in bytes; zero for none.
    pub max_bytes: [u64; 4],
    /// Where it is kept.
    pub storage: Storage,
    /// Copies in a cluster.
    pub replicas: u8,
}

impl Layout {
    /// The defaults, under these names: what `host provision` makes when told nothing else.
    pub fn new(names: Names) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            names,
            subjects: vec!["mail.>".into()],
            filter: None,
            bucket: Some("triage".into()),
            ack_wait: Duration::from_secs(30),
            deadline: Duration::from_secs(1),
            duplicate_window: Duration::from_secs(120),
            max_ack_pending: 20_000,
            mail_max_age: 7 * DAY,
            verdict_max_age: 7 * DAY,
            dead_max_age: Duration::ZERO,
            max_bytes: [0; 4],
            storage: Storage::File,
            replicas: 1,
        }
    }

    /// Checks the settings against each other; asks no server.
    ///
    /// # Errors
    /// Settings that could lose a message or give it two verdicts, and ones the server would not take; each names
    /// its flags.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.subjects.is_empty(), "--subjects is empty");
        for subject in &self.subjects {
            check_pattern("--subjects", subject)?;
            for (flag, other) in
                [("--verdict-subject", self.names.verdict_wildcard()), ("--dead-subject", self.names.dead_wildcard())]
            {
                ensure!(
                    !overlap(subject, &other),
                    "--subjects {subject} overlaps {other} of {flag}; a subject can be in one stream only"
                );
            }
            let replays = self.names.replay_wildcard();
            ensure!(
                !overlap(subject, &replays),
                "--subjects {subject} overlaps {replays} of --replay-subject, which is for operators only and added by \
                 itself"
            );
        }
        if let Some(filter) = &self.filter {
            check_pattern("--filter", filter)?;
            ensure!(
                self.subjects.iter().any(|subject| overlap(subject, filter)),
                "--filter {filter} matches none of --subjects {}; the consumer would get nothing",
                self.subjects.join(",")
            );
        }
        if let Some(bucket) = &self.bucket {
            check_name("--bucket", bucket)?;
            ensure!(
                bucket.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)),
                "--bucket {bucket:?}: only letters, digits, - and _ are allowed"
            );
        }
        let show = humantime::format_duration;
        ensure!(
            self.ack_wait > self.deadline,
            "--ack-wait {} must be longer than --deadline {}: the server would deliver messages again that are still \
             being worked on",
            show(self.ack_wait),
            show(self.deadline)
        );
        ensure!(
            self.verdict_max_age.is_zero()
                || (!self.mail_max_age.is_zero() && self.verdict_max_age >= self.mail_max_age),
            "--verdict-max-age {} must be at least --mail-max-age {}: a message delivered again after its verdict is \
             gone would get a second one",
            show_age(self.verdict_max_age),
            show_age(self.mail_max_age)
        );
        ensure!(
            self.duplicate_window >= Duration::from_millis(100),
            "--duplicate-window {} is too short; at least 100ms",
            show(self.duplicate_window)
        );
        for (flag, age) in [
            ("--mail-max-age", self.mail_max_age),
            ("--verdict-max-age", self.verdict_max_age),
            ("--dead-max-age", self.dead_max_age),
        ] {
            ensure!(
                age.is_zero() || age >= self.duplicate_window,
                "{flag} {} must be at least --duplicate-window {}",
                show(age),
                show(self.duplicate_window)
            );
        }
        Ok(())
    }
}

impl LayoutArgs {
    fn resolve(self, names: Names) -> Result<Layout> {
        let layout = Layout {
            names,
            subjects: self.subjects,
            filter: self.filter,
            bucket: (!self.no_bucket).then_some(self.bucket),
            ack_wait: self.ack_wait,
            deadline: self.deadline,
            duplicate_window: self.duplicate_window,
            max_ack_pending: self.max_ack_pending,
            mail_max_age: self.mail_max_age,
            verdict_max_age: self.verdict_max_age,
            dead_max_age: self.dead_max_age,
            max_bytes: [self.mail_max_bytes, self.verdict_max_bytes, self.dead_max_bytes, self.bucket_max_bytes],
            storage: self.storage,
            replicas: self.replicas,
        };
        layout.check()?;
        Ok(layout)
    }
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
        let mode = match (self.check, self.update) {
            (true, _) => Mode::Check,
            (_, true) => Mode::Update,
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
    /// Create what is missing, change what differs.
    Update,
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
            writeln!(f, "\nWhat differs was left alone; `host provision --update` changes it.")?;
        }
        if has(State::Missing) {
            writeln!(f, "\nNothing was created; `host provision` without --check does that.")?;
        }
        Ok(())
    }
}

/// Creates, updates or checks everything in `layout`.
///
/// Doing it twice changes nothing the second time. Nothing is ever deleted.
///
/// # Errors
/// Settings that contradict each other, no JetStream, whatever the server refuses. What was done before stays; run
/// it again. Existing settings that are unsafe are no error here but in the report.
pub async fn provision(jetstream: &Context, layout: &Layout, mode: Mode) -> Result<Report> {
    layout.check()?;
    check_jetstream(jetstream).await?;
    let names = &layout.names;
    let [mail_max_bytes, verdict_max_bytes, dead_max_bytes, bucket_max_bytes] = layout.max_bytes;
    let verdict_subjects = [names.verdict_wildcard()];
    let dead_subjects = [names.dead_wildcard()];
    let mut report = Report { things: Vec::new(), unsafe_settings: Vec::new() };

    let mail_subjects = [&layout.subjects[..], &[names.replay_wildcard()]].concat();
    let mail = Wanted::stream(&names.stream, &mail_subjects, layout.mail_max_age, mail_max_bytes, layout);
    let mail = mail.bring_about(jetstream, mode, &mut report).await?;
    // An older server ignores a list of filters, and such a consumer would get all of the stream.
    let many_filters = jetstream.client().is_server_compatible(2, 10, 0);
    let consumer = Wanted::consumer(layout, many_filters);
    let consumer = if mail.is_some() {
        consumer.bring_about(jetstream, mode, &mut report).await?
    } else {
        report.things.push(consumer.thing(State::Missing));
        None
    };
    let verdicts =
        Wanted::stream(&names.verdict_stream, &verdict_subjects, layout.verdict_max_age, verdict_max_bytes, layout);
    let verdicts = verdicts.bring_about(jetstream, mode, &mut report).await?;
    let dead = Wanted::stream(&names.dead_stream, &dead_subjects, layout.dead_max_age, dead_max_bytes, layout);
    dead.bring_about(jetstream, mode, &mut report).await?;
    if let Some(bucket) = &layout.bucket {
        Wanted::bucket(bucket, bucket_max_bytes, layout).bring_about(jetstream, mode, &mut report).await?;
    }

    if let (Some(mail), Some(consumer), Some(verdicts)) = (mail, consumer, verdicts) {
        let config = "read the server's answer";
        report.unsafe_settings = unsafe_settings(
            &serde_json::from_value(mail).context(config)?,
            &serde_json::from_value(consumer).context(config)?,
            &serde_json::from_value(verdicts).context(config)?,
            layout.deadline,
        );
    }
    Ok(report)
}

/// What keeps a host from working safely with these: each entry names the thing, the setting and the remedy.
///
/// Safe means that no message is lost silently or gets two verdicts, whatever dies when.
pub fn unsafe_settings(
    mail: &stream::Config,
    consumer: &consumer::Config,
    verdicts: &stream::Config,
    deadline: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    let show = humantime::format_duration;
    let name = consumer.durable_name.as_ref().or(consumer.name.as_ref()).map_or("", String::as_str);
    let consumer_name = format!("consumer {name} of stream {}", mail.name);

    if consumer.deliver_subject.is_some() {
        found.push(format!(
            "{consumer_name} is a push consumer, which cannot hold messages back; delete it and run `host provision`"
        ));
    }
    if consumer.ack_policy != consumer::AckPolicy::Explicit {
        found.push(format!(
            "{consumer_name} has ack policy {:?}: messages would count as done before their verdict is stored; \
             delete it and run `host provision`",
            consumer.ack_policy
        ));
    }
    if consumer.max_deliver > 0 {
        found.push(format!(
            "{consumer_name} has max_deliver {}: the server would give up on messages silently; \
             run `host provision --update` to make it -1",
            consumer.max_deliver
        ));
    }
    let ack_wait = consumer.backoff.iter().min().copied().unwrap_or(consumer.ack_wait);
    if ack_wait <= deadline {
        let setting = if consumer.backoff.is_empty() { "ack_wait" } else { "back-off" };
        found.push(format!(
            "{consumer_name} has {setting} {}, not longer than the deadline of {}: messages would be delivered again \
             while they are worked on; lower --deadline, or run `host provision --update --ack-wait 30s`",
            show(ack_wait),
            show(deadline)
        ));
    }
    if consumer.headers_only {
        found.push(format!("{consumer_name} delivers headers only, no mail; delete it and run `host provision`"));
    }
    if !verdicts.max_age.is_zero() && (mail.max_age.is_zero() || verdicts.max_age < mail.max_age) {
        found.push(format!(
            "stream {} keeps verdicts for {}, stream {} keeps messages {}: a message delivered again could get a \
             second verdict; run `host provision --update` with --verdict-max-age at least --mail-max-age",
            verdicts.name,
            show(verdicts.max_age),
            mail.name,
            if mail.max_age.is_zero() { "for ever".into() } else { format!("for {}", show(mail.max_age)) },
        ));
    }
    if verdicts.retention != RetentionPolicy::Limits {
        found.push(format!(
            "stream {} has retention {:?}: verdicts go when somebody has read them, and a message delivered again \
             could get a second one; recreate it with retention limits",
            verdicts.name, verdicts.retention
        ));
    }
    if verdicts.discard == DiscardPolicy::Old && (verdicts.max_messages > 0 || verdicts.max_bytes > 0) {
        found.push(format!(
            "stream {} throws old verdicts away when it is full (discard old with max_msgs {}, max_bytes {}); \
             run `host provision --update` to make it discard new",
            verdicts.name, verdicts.max_messages, verdicts.max_bytes
        ));
    }
    if verdicts.no_ack {
        found.push(format!(
            "stream {} does not acknowledge what it stores (no_ack), so that no message could ever be done; recreate \
             it without",
            verdicts.name
        ));
    }
    found
}

/// A stream or consumer as it should be.
struct Wanted {
    kind: &'static str,
    shown_name: String,
    about: String,
    /// API subjects to ask, create and update with.
    info: String,
    create: String,
    update: String,
    /// Settings to compare and to update.
    settings: Vec<(&'static str, Value)>,
    /// Settings for its creation only.
    initial: Vec<(&'static str, Value)>,
    /// A consumer's stream: then the configuration is wrapped.
    of_stream: Option<String>,
}

impl Wanted {
    fn stream(name: &str, subjects: &[String], max_age: Duration, max_bytes: u64, layout: &Layout) -> Self {
        let mut subjects = subjects.to_vec();
        subjects.sort();
        Self {
            kind: "stream",
            shown_name: name.to_owned(),
            about: subjects.join(", "),
            info: format!("STREAM.INFO.{name}"),
            create: format!("STREAM.CREATE.{name}"),
            update: format!("STREAM.UPDATE.{name}"),
            settings: vec![
                ("subjects", json!(subjects)),
                ("retention", json!("limits")),
                ("discard", json!("new")),
                ("max_age", nanos(max_age)),
                ("max_bytes", limit(max_bytes)),
                ("duplicate_window", nanos(layout.duplicate_window)),
                ("storage", json!(layout.storage)),
                ("num_replicas", json!(layout.replicas)),
            ],
            initial: vec![("name", json!(name)), ("max_msgs", json!(-1)), ("max_consumers", json!(-1))],
            of_stream: None,
        }
    }

    fn consumer(layout: &Layout, many_filters: bool) -> Self {
        let Names { stream, consumer, .. } = &layout.names;
        let mut filter = layout.filter.clone().unwrap_or_default();
        let mut filters = Vec::new();
        let about = if filter.is_empty() { "all of the stream".into() } else { filter.clone() };
        if many_filters && !filter.is_empty() {
            filters = vec![std::mem::take(&mut filter), layout.names.replay_subject(">")];
            filters.sort();
        }
        // The server wants the filter in the request's subject as well.
        let dot = if filter.is_empty() { "" } else { "." };
        let create = format!("CONSUMER.CREATE.{stream}.{consumer}{dot}{filter}");
        Self {
            kind: "consumer",
            shown_name: format!("{stream}/{consumer}"),
            about,
            info: format!("CONSUMER.INFO.{stream}.{consumer}"),
            update: create.clone(),
            create,
            settings: vec![
                ("deliver_subject", json!("")),
                ("ack_policy", json!("explicit")),
                ("max_deliver", json!(-1)),
                ("ack_wait", nanos(layout.ack_wait)),
                ("max_ack_pending", json!(layout.max_ack_pending)),
                ("filter_subject", json!(filter)),
                ("filter_subjects", json!(filters)),
                ("backoff", json!([])),
                ("headers_only", json!(false)),
                ("inactive_threshold", json!(0)),
            ],
            initial: vec![
                ("name", json!(consumer)),
                ("durable_name", json!(consumer)),
                ("deliver_policy", json!("all")),
                ("replay_policy", json!("instant")),
            ],
            of_stream: Some(stream.clone()),
        }
    }

    /// A bucket is a stream with a certain name and settings; these are the ones every client expects.
    fn bucket(bucket: &str, max_bytes: u64, layout: &Layout) -> Self {
        let name = format!("KV_{bucket}");
        let subjects = [format!("$KV.{bucket}.>")];
        let mut wanted = Self::stream(&name, &subjects, Duration::ZERO, max_bytes, layout);
        wanted.kind = "bucket";
        wanted.shown_name = bucket.to_owned();
        wanted.about = "for guests".into();
        // An expiry or a longer history is the operator's own choice and no difference.
        wanted.settings.retain(|(setting, _)| !matches!(*setting, "max_age" | "duplicate_window"));
        wanted.settings.push(("allow_rollup_hdrs", json!(true)));
        wanted.settings.push(("deny_delete", json!(true)));
        wanted.initial.push(("max_msgs_per_subject", json!(1)));
        wanted.initial.push(("allow_direct", json!(true)));
        wanted
    }

    fn thing(&self, state: State) -> Thing {
        Thing {
            kind: self.kind,
            name: self.shown_name.clone(),
            state,
            differences: Vec::new(),
            about: self.about.clone(),
        }
    }

    /// Does what `mode` allows, reports it, and gives the configuration that is there now.
    async fn bring_about(&self, jetstream: &Context, mode: Mode, report: &mut Report) -> Result<Option<Value>> {
        let what = format!("{} {}", self.kind, self.shown_name);
        let Some(have) = self.find(jetstream).await.with_context(|| format!("look for {what}"))? else {
            if mode == Mode::Check {
                report.things.push(self.thing(State::Missing));
                return Ok(None);
            }
            let wanted: Map<_, _> = self
                .initial
                .iter()
                .chain(&self.settings)
                .filter(|(_, value)| !is_default(value))
                .map(|(setting, value)| ((*setting).to_owned(), value.clone()))
                .collect();
            let config = self.send(jetstream, &self.create, wanted).await.with_context(|| format!("create {what}"))?;
            report.things.push(self.thing(State::Created));
            return Ok(Some(config));
        };

        let mut thing = self.thing(State::AsWanted);
        thing.differences = differences(&have, &self.settings);
        let mut config = Value::Object(have.clone());
        if !thing.differences.is_empty() {
            thing.state = State::Differs;
            if mode == Mode::Update {
                let mut wanted = have;
                for (setting, value) in &self.settings {
                    if is_default(value) {
                        wanted.remove(*setting);
                    } else {
                        wanted.insert((*setting).to_owned(), value.clone());
                    }
                }
                config = self.send(jetstream, &self.update, wanted).await.with_context(|| {
                    let names: Vec<_> = thing.differences.iter().map(|difference| difference.setting).collect();
                    format!(
                        "update {what} ({}); a setting that cannot change needs a new {}",
                        names.join(", "),
                        self.kind
                    )
                })?;
                thing.state = State::Updated;
            }
        }
        report.things.push(thing);
        Ok(Some(config))
    }

    async fn find(&self, jetstream: &Context) -> Result<Option<Map<String, Value>>> {
        match jetstream.request(self.info.clone(), &json!({})).await? {
            Response::Ok(info) => Ok(Some(config_of(info)?)),
            Response::Err { error }
                if matches!(error.error_code(), ErrorCode::STREAM_NOT_FOUND | ErrorCode::CONSUMER_NOT_FOUND) =>
            {
                Ok(None)
            }
            Response::Err { error } => bail!("{error}"),
        }
    }

    async fn send(&self, jetstream: &Context, subject: &str, config: Map<String, Value>) -> Result<Value> {
        let request = match &self.of_stream {
            Some(stream) => json!({ "stream_name": stream, "config": config }),
            None => Value::Object(config),
        };
        match jetstream.request(subject.to_owned(), &request).await? {
            Response::Ok(info) => Ok(Value::Object(config_of(info)?)),
            Response::Err { error } => Err(match error.error_code() {
                ErrorCode::STREAM_SUBJECT_OVERLAP => self.overlap(jetstream).await,
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
    async fn overlap(&self, jetstream: &Context) -> anyhow::Error {
        let mut others = Vec::new();
        let subjects = self.settings.iter().find(|(setting, _)| *setting == "subjects");
        for subject in subjects.and_then(|(_, subjects)| subjects.as_array()).into_iter().flatten() {
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
            self.about
        )
    }
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

fn differences(have: &Map<String, Value>, want: &[(&'static str, Value)]) -> Vec<Difference> {
    let mut found = Vec::new();
    for (setting, want) in want {
        let mut have = have.get(*setting).cloned().unwrap_or(Value::Null);
        if let Value::Array(items) = &mut have
            && matches!(*setting, "subjects" | "filter_subjects")
        {
            items.sort_by_key(Value::to_string);
        }
        if have != *want && !(is_default(&have) && is_default(want)) {
            found.push(Difference { setting, have: show_value(setting, &have), want: show_value(setting, want) });
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
        ("headers_only" | "allow_rollup_hdrs" | "deny_delete", Value::Null) => "false".into(),
        (_, value) if is_default(value) => "none".into(),
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

fn nanos(duration: Duration) -> Value {
    json!(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

fn limit(bytes: u64) -> Value {
    if bytes == 0 { json!(-1) } else { json!(bytes) }
}

fn show_age(age: Duration) -> String {
    if age.is_zero() { "0 (for ever)".into() } else { humantime::format_duration(age).to_string() }
}

fn parse_age(text: &str) -> Result<Duration, humantime::DurationError> {
    if text == "0" { Ok(Duration::ZERO) } else { humantime::parse_duration(text) }
}

/// Reads a size in bytes: `4096`, `64k`, `10GiB`. Units are powers of 1024, however they are written.
fn parse_size(text: &str) -> Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => bail!("a size is a number with a unit, such as 512MiB or 10GiB"),
    };
    let number: u64 = number.parse().context("a size is a number with a unit, such as 512MiB or 10GiB")?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| i64::try_from(bytes).is_ok());
    bytes.context("this size is larger than NATS can count")
}

/// The size as [`parse_size`] reads it, in the largest unit that gives a whole number.
fn show_size(bytes: u64) -> String {
    let unit = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")]
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::consumer::AckPolicy;

    const DEADLINE: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn stream(name: &str) -> stream::Config {
        stream::Config { name: name.into(), discard: DiscardPolicy::New, max_age: 7 * DAY, ..Default::default() }
    }

    fn consumer() -> consumer::Config {
        consumer::Config {
            durable_name: Some("triage".into()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: Duration::from_secs(30),
            max_deliver: -1,
            ..Default::default()
        }
    }

    #[test]
    fn unsafe_settings_are_named() {
        type Change = fn(&mut stream::Config, &mut consumer::Config, &mut stream::Config);
        // (change to safe settings, what the one finding says; nothing if it stays safe)
        let cases: Vec<(Change, Option<&str>)> = vec![
            (|_, _, _| (), None),
            (|_, consumer, _| consumer.deliver_subject = Some("x".into()), Some("push consumer")),
            (|_, consumer, _| consumer.ack_policy = AckPolicy::All, Some("ack policy All")),
            (|_, consumer, _| consumer.ack_policy = AckPolicy::None, Some("ack policy None")),
            (|_, consumer, _| consumer.max_deliver = 5, Some("max_deliver 5")),
            (|_, consumer, _| consumer.ack_wait = DEADLINE, Some("ack_wait 1s")),
            (|_, consumer, _| consumer.ack_wait = 2 * DEADLINE, None),
            (|_, consumer, _| consumer.backoff = vec![10 * DEADLINE, DEADLINE / 2], Some("back-off 500ms")),
            (|_, consumer, _| consumer.headers_only = true, Some("headers only")),
            (|_, _, verdicts| verdicts.max_age = 6 * DAY, Some("second verdict")),
            (|mail, _, _| mail.max_age = Duration::ZERO, Some("for ever")),
            (|mail, _, verdicts| (mail.max_age, verdicts.max_age) = (Duration::ZERO, Duration::ZERO), None),
            (|_, _, verdicts| verdicts.max_age = Duration::ZERO, None),
            (|_, _, verdicts| verdicts.retention = RetentionPolicy::WorkQueue, Some("retention WorkQueue")),
            (|_, _, verdicts| verdicts.discard = DiscardPolicy::Old, None),
            (
                |_, _, verdicts| (verdicts.discard, verdicts.max_messages) = (DiscardPolicy::Old, 9),
                Some("discard old with max_msgs 9"),
            ),
            (
                |_, _, verdicts| (verdicts.discard, verdicts.max_bytes) = (DiscardPolicy::Old, 9),
                Some("discard old with"),
            ),
            (|_, _, verdicts| verdicts.max_bytes = 9, None),
            (|_, _, verdicts| verdicts.no_ack = true, Some("no_ack")),
        ];
        for (number, (change, expected)) in cases.into_iter().enumerate() {
            let (mut mail, mut triage, mut verdicts) = (stream("MAIL"), consumer(), stream("VERDICTS"));
            change(&mut mail, &mut triage, &mut verdicts);
            let found = unsafe_settings(&mail, &triage, &verdicts, DEADLINE);
            match expected {
                None => assert!(found.is_empty(), "case {number}: {found:?}"),
                Some(expected) => assert!(found.len() == 1 && found[0].contains(expected), "case {number}: {found:?}"),
            }
        }
    }

    #[test]
    fn unsafe_wishes_are_refused() {
        type Change = fn(&mut Layout);
        let cases: Vec<(Change, &str)> = vec![
            (|layout| layout.ack_wait = layout.deadline, "--ack-wait"),
            (|layout| layout.verdict_max_age = DAY, "--verdict-max-age"),
            (|layout| layout.mail_max_age = Duration::ZERO, "--verdict-max-age"),
            (|layout| layout.subjects = vec!["mail.>".into(), "verdict.*.x".into()], "--verdict-subject"),
            (|layout| layout.subjects = vec![">".into()], "overlaps"),
            (|layout| layout.subjects = vec!["dead.letters.>".into()], "--dead-subject"),
            (|layout| layout.subjects = vec!["replay.*.x".into()], "--replay-subject"),
            (|layout| layout.subjects = vec!["a..b".into()], "--subjects"),
            (|layout| layout.filter = Some("orders.>".into()), "--filter"),
            (|layout| layout.bucket = Some("a b".into()), "--bucket"),
            (|layout| layout.dead_max_age = Duration::from_secs(1), "--dead-max-age"),
        ];
        for (change, expected) in cases {
            let mut layout = Layout::new(Names::default());
            layout.check().expect("the defaults are safe");
            change(&mut layout);
            let err = layout.check().expect_err(expected).to_string();
            assert!(err.contains(expected), "{err}");
        }
    }

    #[test]
    fn flags_and_defaults_agree() {
        #[derive(Debug, clap::Parser)]
        struct Command {
            #[command(flatten)]
            layout: LayoutArgs,
        }
        let typed = <Command as clap::Parser>::parse_from(["test"]).layout.resolve(Names::default()).expect("defaults");
        assert_eq!(format!("{typed:?}"), format!("{:?}", Layout::new(Names::default())));
    }

    #[test]
    fn only_real_differences_count() {
        let have = json!({
            "subjects": ["b", "a"], "max_age": 604_800_000_000_000_u64, "max_bytes": -1, "discard": "old", "filter_subject": "x"
        });
        let want = [
            ("subjects", json!(["a", "b"])),
            ("max_age", nanos(DAY)),
            ("max_bytes", limit(0)),
            ("discard", json!("new")),
            ("backoff", json!([])),
            ("filter_subject", json!("")),
            ("allow_rollup_hdrs", json!(true)),
        ];
        let found: Vec<String> = differences(have.as_object().expect("object"), &want)
            .into_iter()
            .map(|Difference { setting, have, want }| format!("{setting} {have} {want}"))
            .collect();
        assert_eq!(
            found,
            ["max_age 7days 1day", "discard old new", "filter_subject x none", "allow_rollup_hdrs false true"]
        );
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64k", 65_536), ("10GiB", 10 << 30), ("2 mb", 2 << 20)] {
            assert_eq!(parse_size(text).expect(text), bytes);
            assert_eq!(parse_size(&show_size(bytes)).expect(text), bytes);
        }
        for text in ["", "GiB", "1.5G", "10x", "-1", "99999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
