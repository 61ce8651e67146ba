//! What a ScaledObject's trigger asks for: its metadata, as typed and as meant.

use crate::names::check_name;
use anyhow::{Context as _, Result, bail, ensure};
use external_scaler::MetricSpec;
use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

/// The trigger's own keys.
const KEYS: [&str; 6] =
    ["stream", "consumer", "lagThreshold", "activationLagThreshold", "targetDrainSeconds", "maxInFlight"];

/// KEDA's keys, which it hands on with the others: where the scaler is, and how to reach it.
const KEYS_OF_KEDA: [&str; 7] =
    ["scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsCertFile", "tlsClientCert", "tlsClientKey"];

/// KEDA appends this to a key whose value it has taken from the scaled container's environment.
const FROM_ENVIRONMENT: &str = "FromEnv";

/// The longest time to drain that makes sense.
const DRAIN_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A trigger, as meant.
#[derive(Debug, Clone, PartialEq)]
pub struct Trigger {
    /// The stream that the messages come from.
    pub stream: String,
    /// The durable consumer on it.
    pub consumer: String,
    /// Messages, waiting or in flight, that one replica is for. At least 1.
    pub lag_threshold: u64,
    /// There is something to do when there are more messages than this.
    pub activation: u64,
    /// In which time the replicas shall be done with all there is; `None` for counting messages only.
    pub drain: Option<Duration>,
    /// Messages that one replica holds at most, fetched and not settled. At least 1.
    pub places: u64,
}

impl Trigger {
    /// Reads a trigger's metadata.
    ///
    /// # Errors
    /// A key that is missing, unknown, given twice or of a value that it cannot have: names it, and says what to do.
    pub fn parse(metadata: &HashMap<String, String>) -> Result<Self> {
        for key in metadata.keys() {
            let own = key.strip_suffix(FROM_ENVIRONMENT).unwrap_or(key);
            ensure!(
                KEYS.contains(&own) || KEYS_OF_KEDA.contains(&own),
                "{key}: no key of this trigger; remove it, or write one of {}",
                KEYS.join(", ")
            );
        }
        let drain = number::<f64>(metadata, "targetDrainSeconds", "a time in seconds, 60 for example")?;
        let drain = drain.map(|seconds| {
            let time = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero() && *time <= DRAIN_MAX);
            time.with_context(|| {
                format!("targetDrainSeconds {seconds}: more than 0 and at most {}; 60 for example", DRAIN_MAX.as_secs())
            })
        });
        let count = |key, default| number::<u64>(metadata, key, "a whole number").map(|found| found.unwrap_or(default));
        let trigger = Self {
            stream: name(metadata, "stream", "MAIL")?,
            consumer: name(metadata, "consumer", "triage")?,
            lag_threshold: count("lagThreshold", 10)?,
            activation: count("activationLagThreshold", 0)?,
            drain: drain.transpose()?,
            places: count("maxInFlight", 256)?,
        };
        ensure!(trigger.lag_threshold > 0, "lagThreshold 0: a replica is for one message at least; 1000 for example");
        ensure!(
            trigger.places > 0,
            "maxInFlight 0: a replica holds one message at least; as `host run --max-in-flight`"
        );
        Ok(trigger)
    }

    /// The metric, and how much of it one replica is for: messages, or with a time to drain replicas themselves.
    pub fn spec(&self) -> MetricSpec {
        let target = if self.drain.is_some() { 1 } else { self.lag_threshold };
        #[expect(clippy::cast_precision_loss, reason = "nobody gives a replica 2^53 messages")]
        let target_size_float = target as f64;
        MetricSpec {
            metric_name: self.metric_name(),
            target_size: i64::try_from(target).unwrap_or(i64::MAX),
            target_size_float,
        }
    }

    /// What the metric is called: what Kubernetes takes in a metric's name.
    pub fn metric_name(&self) -> String {
        let kind = if self.drain.is_some() { "drain" } else { "lag" };
        let name = format!("{kind}-{}-{}", self.stream, self.consumer);
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect()
    }
}

/// The value of `key`, given as it is or from the environment.
fn value<'a>(metadata: &'a HashMap<String, String>, key: &str) -> Result<Option<&'a str>> {
    let from_environment = format!("{key}{FROM_ENVIRONMENT}");
    match (metadata.get(key), metadata.get(&from_environment)) {
        (Some(_), Some(_)) => bail!("{key} and {from_environment} are both given; remove one of them"),
        (one, other) => Ok(one.or(other).map(|text| text.trim())),
    }
}

fn name(metadata: &HashMap<String, String>, key: &str, example: &str) -> Result<String> {
    let name =
        value(metadata, key)?.with_context(|| format!("{key} is missing; add `{key}: {example}`, for example"))?;
    check_name(key, name)?;
    Ok(name.to_owned())
}

fn number<T: FromStr>(metadata: &HashMap<String, String>, key: &str, what: &str) -> Result<Option<T>> {
    let Some(text) = value(metadata, key)? else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => bail!("{key} {text:?}: not {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Trigger> {
        Trigger::parse(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn keys_of_keda_are_passed_over_and_defaults_are_those_of_its_own_trigger() {
        let keda = [("scalerAddress", "s:1"), ("enableTLS", "true"), ("unsafeSsl", "false"), ("tlsCertFile", "/a")];
        let trigger =
            parse(&[&[("stream", "MAIL"), ("consumerFromEnv", "triage")][..], &keda[..]].concat()).expect("parse");
        let expected = Trigger {
            stream: "MAIL".into(),
            consumer: "triage".into(),
            lag_threshold: 10,
            activation: 0,
            drain: None,
            places: 256,
        };
        assert_eq!(trigger, expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_remedy() {
        let cases: [(&[(&str, &str)], &str); 14] = [
            (&[("consumer", "c")], "stream is missing; add"),
            (&[("stream", "S")], "consumer is missing; add"),
            (&[("stream", "S.x"), ("consumer", "c")], "stream \"S.x\""),
            (&[("stream", ""), ("consumer", "c")], "stream is empty"),
            (&[("lagTreshold", "5")], "lagTreshold: no key of this trigger; remove it, or write one of stream, "),
            (&[("account", "$G")], "account: no key"),
            (&[("lagThreshold", "0")], "lagThreshold 0"),
            (&[("lagThreshold", "-5")], "lagThreshold \"-5\": not a whole number"),
            (&[("lagThreshold", "many")], "lagThreshold \"many\""),
            (&[("activationLagThreshold", "0.5")], "activationLagThreshold \"0.5\""),
            (&[("targetDrainSeconds", "0")], "targetDrainSeconds 0: more than 0"),
            (&[("targetDrainSeconds", "inf")], "targetDrainSeconds inf: more than 0"),
            (&[("targetDrainSeconds", "1m")], "targetDrainSeconds \"1m\": not a time in seconds"),
            (&[("maxInFlight", "0")], "maxInFlight 0"),
        ];
        for (pairs, expected) in cases {
            // Whatever is missing in these is not what is wrong with them.
            let whole = [("stream", "S"), ("consumer", "c")];
            let about_names = expected.starts_with("stream") || expected.starts_with("consumer");
            let pairs = if about_names { pairs.to_vec() } else { [pairs, &whole[..]].concat() };
            let err = format!("{:#}", parse(&pairs).expect_err(expected));
            assert!(err.contains(expected), "{pairs:?}: {err}");
        }
        let twice = parse(&[("stream", "S"), ("streamFromEnv", "S"), ("consumer", "c")]).expect_err("twice");
        assert!(twice.to_string().contains("both given"), "{twice}");
    }

    #[test]
    fn the_metric_is_messages_or_replicas() {
        let lag = parse(&[("stream", "Mail_1"), ("consumer", "c"), ("lagThreshold", "1000")]).expect("lag").spec();
        assert_eq!((lag.metric_name.as_str(), lag.target_size, lag.target_size_float), ("lag-mail-1-c", 1000, 1000.0));
        let drain = parse(&[("stream", "S"), ("consumer", "c"), ("targetDrainSeconds", "0.5")]).expect("drain").spec();
        assert_eq!((drain.metric_name.as_str(), drain.target_size, drain.target_size_float), ("drain-s-c", 1, 1.0));
    }
}
