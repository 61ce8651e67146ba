//! What a host needs on the server: the streams, the consumer and the bucket, as flags give them and as settings of
//! NATS, and which settings are unsafe.

use crate::names::{Names, check_bucket, check_pattern, overlap};
use crate::parking::{DUE_ACK_WAIT, DUE_CONSUMER};
use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{consumer, stream};
use clap::parser::ValueSource;
use clap::{ArgMatches, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Settings")]
pub struct LayoutArgs {
    // First, since reading the others takes them away.
    #[command(flatten)]
    given: Given,

    /// Subjects that the stream takes; separate several with commas or repeat the flag
    #[arg(long, value_name = "SUBJECT", env = "MAILROOM_SUBJECTS", value_delimiter = ',', default_value = "mail.>")]
    subjects: Vec<String>,

    /// Give the consumer only the messages on this subject; `>` for all [default: all of the stream]
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

/// Which arguments were given, on the command line or in the environment: the others have their defaults.
#[derive(Debug, Clone, Default)]
pub struct Given(BTreeSet<String>);

impl Given {
    fn has(&self, argument: &str) -> bool {
        self.0.contains(argument)
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Self::default();
        given.update_from_arg_matches(matches)?;
        Ok(given)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let is_given = |id: &&clap::Id| {
            matches.value_source(id.as_str()).is_some_and(|source| source != ValueSource::DefaultValue)
        };
        self.0 = matches.ids().filter(is_given).map(ToString::to_string).collect();
        Ok(())
    }
}

/// It has no arguments of its own.
impl clap::Args for Given {
    fn augment_args(command: clap::Command) -> clap::Command {
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        command
    }
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
    /// Which of the settings are wanted of what exists, too; the others are for what is created.
    pub given: Given,
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
            given: Given::default(),
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

    /// Checks the settings that are given, and against each other; asks no server. Those that are not given may be
    /// others on the server.
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
        }
        if let Some(bucket) = &self.bucket {
            check_bucket("--bucket", bucket)?;
        }
        let show = humantime::format_duration;
        ensure!(
            !self.given.has("ack_wait") || self.ack_wait > self.deadline,
            "--ack-wait {} must be longer than --deadline {}: the server would deliver messages again that are still \
             being worked on",
            show(self.ack_wait),
            show(self.deadline)
        );
        ensure!(
            self.duplicate_window >= Duration::from_millis(100),
            "--duplicate-window {} is too short; at least 100ms",
            show(self.duplicate_window)
        );
        Ok(())
    }

    /// A setting that a flag gives.
    fn setting(&self, name: &'static str, flag: &'static str, value: Value) -> Setting {
        let lasting = self.given.has(&flag.trim_start_matches('-').replace('-', "_"));
        Setting { name, value, flag, lasting }
    }
}

impl LayoutArgs {
    /// The layout as typed, under these names.
    ///
    /// # Errors
    /// As [`Layout::check`].
    pub fn resolve(self, names: Names) -> Result<Layout> {
        let layout = Layout {
            names,
            given: self.given,
            subjects: self.subjects,
            filter: self.filter.filter(|filter| filter != ">"),
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
             while they are worked on; lower --deadline, or run `host provision --update --ack-wait {}`",
            show(ack_wait),
            show(deadline),
            as_typed(advised_ack_wait(deadline))
        ));
    }
    if consumer.headers_only {
        found.push(format!("{consumer_name} delivers headers only, no mail; delete it and run `host provision`"));
    }
    if !verdicts.max_age.is_zero() && (mail.max_age.is_zero() || verdicts.max_age < mail.max_age) {
        found.push(format!(
            "stream {} keeps verdicts for {}, stream {} keeps messages {}: a message delivered again could get a \
             second verdict; run `host provision --update` with `--verdict-max-age {}`",
            verdicts.name,
            show(verdicts.max_age),
            mail.name,
            if mail.max_age.is_zero() { "for ever".into() } else { format!("for {}", show(mail.max_age)) },
            as_typed(mail.max_age)
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

/// The `ack_wait` that suits a deadline: the default, or twice as long.
fn advised_ack_wait(deadline: Duration) -> Duration {
    Duration::from_secs(30).max(deadline.saturating_mul(2))
}

/// What the server can do that older ones cannot.
#[derive(Clone, Copy)]
pub struct Server {
    /// Take a list of filters; others ignore it, and such a consumer would get all of the stream.
    pub many_filters: bool,
    /// Publish messages at a time that they name.
    pub schedules: bool,
}

/// A stream, consumer or bucket as it should be.
pub struct Wanted {
    pub kind: &'static str,
    pub shown_name: String,
    /// What a bucket is for; streams and consumers tell by their settings.
    pub about: Option<&'static str>,
    /// API subjects to ask, create and update with.
    pub info: String,
    pub create: String,
    pub update: String,
    pub settings: Vec<Setting>,
    /// Subjects that an existing stream, or filters that an existing consumer with a filter must have.
    pub must_take: Vec<String>,
    /// A source that an existing stream must have.
    pub must_source: Option<Value>,
    /// A consumer's stream: then the configuration is wrapped.
    pub of_stream: Option<String>,
}

/// A setting, as NATS calls it.
#[derive(Clone)]
pub struct Setting {
    pub name: &'static str,
    pub value: Value,
    /// With which flag it is set, if with any.
    pub flag: &'static str,
    /// Whether it is wanted of what exists, too, or for its creation only.
    pub lasting: bool,
}

impl Setting {
    /// One that what exists has to have, too.
    pub fn always(name: &'static str, value: Value) -> Self {
        Self { name, value, flag: "", lasting: true }
    }

    /// One for the creation only.
    pub fn at_first(name: &'static str, value: Value) -> Self {
        Self { name, value, flag: "", lasting: false }
    }
}

impl Wanted {
    /// Everything in the layout: the stream of parked retries, which the message stream may have among its sources,
    /// message stream, consumer, verdict stream, dead-letter stream, perhaps the bucket; where the server has no schedules,
    /// the consumer of parked retries.
    pub fn all(layout: &Layout, server: Server) -> Vec<Self> {
        let Layout { names, mail_max_age, verdict_max_age, dead_max_age, .. } = layout;
        let [mail_max_bytes, verdict_max_bytes, dead_max_bytes, bucket_max_bytes] = layout.max_bytes;
        let mut all = vec![
            Self::parked(layout, server),
            Self::mail(layout, server).with_max_age("--mail-max-age", *mail_max_age, layout).with_max_bytes(
                "--mail-max-bytes",
                mail_max_bytes,
                layout,
            ),
            Self::consumer(layout, server),
            Self::stream(&names.verdict_stream, vec![names.verdict_wildcard()], layout)
                .with(Setting::always("retention", json!("limits")))
                .with_max_age("--verdict-max-age", *verdict_max_age, layout)
                .with_max_bytes("--verdict-max-bytes", verdict_max_bytes, layout),
            Self::stream(&names.dead_stream, vec![names.dead_wildcard()], layout)
                .with(Setting::always("retention", json!("limits")))
                .with_max_age("--dead-max-age", *dead_max_age, layout)
                .with_max_bytes("--dead-max-bytes", dead_max_bytes, layout),
        ];
        if let Some(bucket) = &layout.bucket {
            all.push(Self::bucket(bucket, layout).with_max_bytes("--bucket-max-bytes", bucket_max_bytes, layout));
        }
        if !server.schedules {
            all.push(Self::due_consumer(layout));
        }
        all
    }

    fn stream(name: &str, subjects: Vec<String>, layout: &Layout) -> Self {
        Self {
            kind: "stream",
            shown_name: name.to_owned(),
            about: None,
            info: format!("STREAM.INFO.{name}"),
            create: format!("STREAM.CREATE.{name}"),
            update: format!("STREAM.UPDATE.{name}"),
            settings: vec![
                Setting::at_first("name", json!(name)),
                Setting::at_first("max_msgs", json!(-1)),
                Setting::at_first("max_consumers", json!(-1)),
                Setting::at_first("subjects", json!(subjects)),
                Setting::always("discard", json!("new")),
                layout.setting("duplicate_window", "--duplicate-window", nanos(layout.duplicate_window)),
                layout.setting("storage", "--storage", json!(layout.storage)),
                layout.setting("num_replicas", "--replicas", json!(layout.replicas)),
            ],
            must_take: subjects,
            must_source: None,
            of_stream: None,
        }
    }

    /// The stream of parked retries. It has no limits beside the age of messages: a server that publishes what is due
    /// does not refuse what has no room, it would throw away what is oldest.
    fn parked(layout: &Layout, server: Server) -> Self {
        let mut wanted = Self::stream(&layout.names.parked_stream, vec![layout.names.parked_wildcard()], layout)
            .with(Setting::always("retention", json!("limits")))
            .with(Setting::always("max_bytes", json!(-1)))
            .with(Setting::at_first("max_age", nanos(layout.mail_max_age)));
        for setting in &mut wanted.settings {
            match setting.name {
                "discard" => setting.value = json!("old"),
                "max_msgs" => setting.lasting = true,
                _ => {}
            }
        }
        if server.schedules { wanted.with(Setting::always("allow_msg_schedules", json!(true))) } else { wanted }
    }

    /// Where retries wait that a host has to bring back.
    fn due_consumer(layout: &Layout) -> Self {
        let stream = &layout.names.parked_stream;
        let create = format!("CONSUMER.CREATE.{stream}.{DUE_CONSUMER}");
        Self {
            kind: "consumer",
            shown_name: format!("{stream}/{DUE_CONSUMER}"),
            about: None,
            info: format!("CONSUMER.INFO.{stream}.{DUE_CONSUMER}"),
            update: create.clone(),
            create,
            settings: vec![
                Setting::at_first("name", json!(DUE_CONSUMER)),
                Setting::at_first("durable_name", json!(DUE_CONSUMER)),
                Setting::at_first("deliver_policy", json!("all")),
                Setting::at_first("replay_policy", json!("instant")),
                Setting::always("ack_policy", json!("explicit")),
                Setting::always("max_deliver", json!(-1)),
                Setting::always("max_ack_pending", json!(-1)),
                Setting::at_first("ack_wait", nanos(DUE_ACK_WAIT)),
                Setting::always("filter_subject", json!(layout.names.held_wildcard())),
            ],
            must_take: Vec::new(),
            must_source: None,
            of_stream: Some(stream.clone()),
        }
    }

    /// The message stream, whose retention is the operator's choice.
    fn mail(layout: &Layout, server: Server) -> Self {
        let replays = layout.names.replay_wildcard();
        let mut subjects = [&layout.subjects[..], std::slice::from_ref(&replays)].concat();
        subjects.sort();
        let mut wanted = Self::stream(&layout.names.stream, vec![replays], layout)
            .with(Setting::at_first("retention", json!("limits")));
        wanted.settings.retain(|setting| setting.name != "subjects");
        let wanted = wanted.with(layout.setting("subjects", "--subjects", json!(subjects)));
        if !server.schedules {
            return wanted;
        }
        let Names { parked_stream, .. } = &layout.names;
        let transform = json!({ "src": layout.names.due_wildcard(), "dest": layout.names.replay_wildcard() });
        let source = json!({ "name": parked_stream, "subject_transforms": [transform] });
        let mut wanted = wanted.with(Setting::at_first("sources", json!([source])));
        wanted.must_source = Some(source);
        wanted
    }

    fn consumer(layout: &Layout, server: Server) -> Self {
        let Names { stream, consumer, .. } = &layout.names;
        let mut filter = layout.filter.clone().unwrap_or_default();
        let mut filters = Vec::new();
        let replays = layout.names.replay_subject(">");
        if server.many_filters && !filter.is_empty() {
            filters = vec![std::mem::take(&mut filter), replays.clone()];
            filters.sort();
        }
        let create = format!("CONSUMER.CREATE.{stream}.{consumer}");
        Self {
            kind: "consumer",
            shown_name: format!("{stream}/{consumer}"),
            about: None,
            info: format!("CONSUMER.INFO.{stream}.{consumer}"),
            update: create.clone(),
            create,
            settings: vec![
                Setting::at_first("name", json!(consumer)),
                Setting::at_first("durable_name", json!(consumer)),
                Setting::at_first("deliver_policy", json!("all")),
                Setting::at_first("replay_policy", json!("instant")),
                Setting::always("deliver_subject", json!("")),
                Setting::always("ack_policy", json!("explicit")),
                Setting::always("max_deliver", json!(-1)),
                layout.setting("ack_wait", "--ack-wait", nanos(layout.ack_wait)),
                layout.setting("max_ack_pending", "--max-ack-pending", json!(layout.max_ack_pending)),
                layout.setting("filter_subject", "--filter", json!(filter)),
                layout.setting("filter_subjects", "--filter", json!(filters)),
                Setting::always("backoff", json!([])),
                Setting::always("headers_only", json!(false)),
                Setting::always("inactive_threshold", json!(0)),
            ],
            must_take: if server.many_filters { vec![replays] } else { Vec::new() },
            must_source: None,
            of_stream: Some(stream.clone()),
        }
    }

    /// A bucket is a stream with a certain name and settings; these are the ones every client expects.
    fn bucket(bucket: &str, layout: &Layout) -> Self {
        let mut wanted = Self::stream(&format!("KV_{bucket}"), vec![format!("$KV.{bucket}.>")], layout)
            .with(Setting::always("retention", json!("limits")))
            .with(Setting::always("allow_rollup_hdrs", json!(true)))
            .with(Setting::always("deny_delete", json!(true)))
            .with(Setting::at_first("max_msgs_per_subject", json!(1)))
            .with(Setting::at_first("allow_direct", json!(true)));
        wanted.kind = "bucket";
        wanted.shown_name = bucket.to_owned();
        wanted.about = Some("for guests");
        // An expiry is the operator's own choice, and the window the server's.
        wanted.settings.retain(|setting| setting.name != "duplicate_window");
        wanted
    }

    fn with(mut self, setting: Setting) -> Self {
        self.settings.push(setting);
        self
    }

    fn with_max_age(self, flag: &'static str, age: Duration, layout: &Layout) -> Self {
        self.with(layout.setting("max_age", flag, nanos(age)))
    }

    fn with_max_bytes(self, flag: &'static str, bytes: u64, layout: &Layout) -> Self {
        self.with(layout.setting("max_bytes", flag, limit(bytes)))
    }
}

pub fn nanos(duration: Duration) -> Value {
    json!(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
}

pub fn limit(bytes: u64) -> Value {
    if bytes == 0 { json!(-1) } else { json!(bytes) }
}

/// A time as a flag takes it, in one word.
pub fn as_typed(time: Duration) -> String {
    let seconds = time.as_secs();
    match [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")].into_iter().find(|(unit, _)| seconds.is_multiple_of(*unit))
    {
        _ if time.is_zero() => "0".into(),
        Some((unit, name)) if time.subsec_nanos() == 0 => format!("{}{name}", seconds / unit),
        // Rounded up.
        _ => format!("{}ms", time.as_nanos().div_ceil(1_000_000)),
    }
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
pub fn show_size(bytes: u64) -> String {
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
    fn the_advice_about_unsafe_times_mends_them() {
        for (deadline, mail_max_age, advice) in [
            (30_000, 7 * DAY, ["--ack-wait 1m`", "--verdict-max-age 7d`"]),
            (40_000, 90 * DAY / 24, ["--ack-wait 80s`", "--verdict-max-age 90h`"]),
            (30_001, Duration::ZERO, ["--ack-wait 60002ms`", "--verdict-max-age 0`"]),
        ] {
            let (mut mail, mut verdicts) = (stream("MAIL"), stream("VERDICTS"));
            (mail.max_age, verdicts.max_age) = (mail_max_age, DEADLINE);
            let found = unsafe_settings(&mail, &consumer(), &verdicts, Duration::from_millis(deadline)).join("; ");
            assert!(advice.iter().all(|advice| found.contains(advice)), "{found}");
        }
    }

    #[test]
    fn unsafe_wishes_are_refused() {
        type Change = fn(&mut Layout);
        let cases: Vec<(Change, &str)> = vec![
            (|layout| (layout.given, layout.ack_wait) = (given("ack_wait"), layout.deadline), "--ack-wait"),
            (|layout| layout.duplicate_window = DEADLINE / 20, "--duplicate-window"),
            (|layout| layout.subjects = vec!["mail.>".into(), "verdict.*.x".into()], "--verdict-subject"),
            (|layout| layout.subjects = vec![">".into()], "overlaps"),
            (|layout| layout.subjects = vec!["dead.letters.>".into()], "--dead-subject"),
            (|layout| layout.subjects = vec!["replay.*.x".into()], "--replay-subject"),
            (|layout| layout.subjects = vec!["a..b".into()], "--subjects"),
            (|layout| layout.filter = Some("a..b".into()), "--filter"),
            (|layout| layout.bucket = Some("a b".into()), "--bucket"),
        ];
        for (change, expected) in cases {
            let mut layout = Layout::new(Names::default());
            layout.check().expect("the defaults are safe");
            change(&mut layout);
            let err = layout.check().expect_err(expected).to_string();
            assert!(err.contains(expected), "{err}");
        }
    }

    fn given(argument: &str) -> Given {
        Given([argument.to_owned()].into())
    }

    fn typed(args: &[&str]) -> Layout {
        #[derive(Debug, clap::Parser)]
        struct Command {
            #[command(flatten)]
            layout: LayoutArgs,
        }
        let args = std::iter::once("test").chain(args.iter().copied());
        <Command as clap::Parser>::parse_from(args).layout.resolve(Names::default()).expect("sound settings")
    }

    /// One that can all of it.
    const NEW: Server = Server { many_filters: true, schedules: true };

    #[test]
    fn flags_and_defaults_agree() {
        assert_eq!(format!("{:?}", typed(&[])), format!("{:?}", Layout::new(Names::default())));
    }

    /// What is compared with what exists: settings that no flag is given for only where the host needs them.
    #[test]
    fn what_no_flag_is_given_for_stays_as_it_is() {
        let names = |wanted: &Wanted| -> Vec<&str> {
            wanted.settings.iter().filter(|setting| setting.lasting).map(|setting| setting.name).collect()
        };
        let all = |args: &[&str]| Wanted::all(&typed(args), NEW).iter().map(names).collect::<Vec<_>>();
        let consumer =
            ["deliver_subject", "ack_policy", "max_deliver", "backoff", "headers_only", "inactive_threshold"];
        let kept = ["discard", "retention"];
        let bucket = ["discard", "retention", "allow_rollup_hdrs", "deny_delete"];
        let parked = ["max_msgs", "discard", "retention", "max_bytes", "allow_msg_schedules"];
        assert_eq!(all(&[]), [&parked[..], &kept[..1], &consumer, &kept, &kept, &bucket]);
        let all = all(&["--no-bucket", "--mail-max-age", "1d", "--storage", "file", "--filter", "mail.a"]);
        assert_eq!(all[1], ["discard", "storage", "max_age"]);
        assert!(all[2].contains(&"filter_subjects") && !all[2].contains(&"ack_wait"), "{:?}", all[2]);
        assert_eq!(all[4], ["discard", "storage", "retention"]);
    }

    /// An older server knows nothing of schedules: retries wait at a consumer there.
    #[test]
    fn what_is_wanted_is_what_the_server_can() {
        let shown = |server| -> Vec<String> {
            let all = Wanted::all(&typed(&[]), server);
            let with_sources = all.iter().filter(|wanted| wanted.must_source.is_some());
            let sources = with_sources.map(|wanted| format!("{} has a source", wanted.shown_name));
            all.iter().map(|wanted| wanted.shown_name.clone()).chain(sources).collect()
        };
        let always = ["PARKED", "MAIL", "MAIL/triage", "VERDICTS", "DEAD", "triage"];
        assert_eq!(shown(NEW), [&always[..], &["MAIL has a source"]].concat());
        assert_eq!(shown(Server { many_filters: true, schedules: false }), [&always[..], &["PARKED/due"]].concat());
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
