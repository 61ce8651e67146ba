//! How fast hosts work, and how many of them are needed to be done in time. Pure: what is looked at comes from outside.
//!
//! Nobody tells the scaler how many hosts there are, and the server does not know: its count of waiting pulls is zero
//! just when there is most to do. But there is no need to count. A host holds a limited number of messages, its
//! *places* (`--max-in-flight` for each of its shards), and while more are waiting it keeps them taken. A message is
//! in a place for `in flight ÷ settled a second` (Little's law, over all hosts), so that
//!
//! ```text
//! a place settles      speed = settled a second ÷ in flight      messages a second
//! a host settles       speed × places
//! in `drain` seconds   speed × places × drain
//! replicas             backlog ÷ (speed × places × drain)
//! ```
//!
//! Assumed: all hosts have as many places, and keep them taken while there is more. Hosts ask for more when half of
//! their places are free, so one that settles in bursts may be taken for up to twice as fast as it is; in the recorded
//! curves all places are taken at nearly every look. Messages that wait for another delivery are in flight as well and
//! make hosts look slower; that gives more replicas, not fewer. A redelivery counts as work done, since it was.

use std::time::Duration;

/// How long a speed counts: what was observed so long ago has a third of the weight of what is observed now.
const MEMORY: Duration = Duration::from_secs(30);

/// The shortest time over which a speed is taken.
const WINDOW_MIN: Duration = Duration::from_secs(1);

/// KEDA hands values on in thousandths: the least that is not nothing.
const LEAST: f64 = 0.001;

/// A look at the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When, on any clock that only goes forward.
    pub at: Duration,
    /// Messages that no host has.
    pub waiting: u64,
    /// Messages delivered and not settled.
    pub in_flight: u64,
    /// Deliveries since the consumer was made.
    pub delivered: u64,
}

impl Sample {
    /// What there is to do.
    pub fn lag(&self) -> u64 {
        self.waiting.saturating_add(self.in_flight)
    }

    /// Deliveries that came to an end.
    fn settled(&self) -> u64 {
        self.delivered.saturating_sub(self.in_flight)
    }

    /// Whether every host has all it can take.
    fn is_busy(&self) -> bool {
        self.waiting > 0 && self.in_flight > 0
    }
}

/// The speed of a consumer's hosts, as far as it was observed.
#[derive(Debug, Default)]
pub struct Rate {
    /// The look that the window begins with; hosts have been busy since.
    begin: Option<Sample>,
    /// Messages that a place settles in a second.
    speed: Option<f64>,
    /// How long hosts were observed in all.
    observed: Duration,
}

impl Rate {
    /// Takes note of a look. Those at which hosts are not busy say nothing about how fast they could be.
    pub fn observe(&mut self, now: Sample) {
        if !now.is_busy() {
            self.begin = None;
            return;
        }
        let Some(begin) = self.begin.filter(|begin| begin.delivered <= now.delivered) else {
            self.begin = Some(now);
            return;
        };
        let settled = now.settled().saturating_sub(begin.settled());
        let time = now.at.saturating_sub(begin.at);
        // Slow guests may settle nothing for a while: the window goes on then.
        if time < WINDOW_MIN || settled == 0 {
            return;
        }
        let in_flight = (begin.in_flight as f64 + now.in_flight as f64) / 2.0;
        let speed = settled as f64 / time.as_secs_f64() / in_flight;
        // A mean of all that was observed, and when that is long enough, of what was observed lately.
        self.observed += time;
        let of_all = time.as_secs_f64() / self.observed.as_secs_f64();
        let weight = of_all.max(1.0 - (-time.as_secs_f64() / MEMORY.as_secs_f64()).exp());
        self.speed = Some(self.speed.map_or(speed, |known| known + weight * (speed - known)));
        self.begin = Some(now);
    }

    /// Messages that a place settles in a second; `None` before any were.
    pub fn speed(&self) -> Option<f64> {
        self.speed
    }
}

/// How many replicas are needed for `lag` messages, in fractions.
///
/// With a known `speed` so many that all is done in `drain`, but never more than one for each message. Before any is
/// known, one for every `lag_threshold` messages. More messages never need fewer, and as long as there are any it is
/// never below the least that KEDA tells from nothing (0.001).
pub fn replicas(lag: u64, speed: Option<f64>, places: u64, drain: Duration, lag_threshold: u64) -> f64 {
    if lag == 0 {
        return 0.0;
    }
    let lag = lag as f64;
    let for_each = match speed {
        Some(speed) => speed * places as f64 * drain.as_secs_f64(),
        None => lag_threshold as f64,
    };
    (lag / for_each.max(1.0)).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::fuzz::{any, check, collection, option};

    /// What the server told of real hosts, four looks a second: seconds, waiting, in flight, delivered.
    const ONE_HOST: &str = include_str!("curves/one-host.csv");
    const TWO_HOSTS: &str = include_str!("curves/two-hosts.csv");
    const WAITING_GUESTS: &str = include_str!("curves/waiting-guests.csv");
    const TRICKLE: &str = include_str!("curves/trickle.csv");

    /// The hosts' `--max-in-flight` in the curves, with one shard each.
    const PLACES: u64 = 512;
    const DRAIN: Duration = Duration::from_secs(10);

    fn samples(curve: &str) -> Vec<Sample> {
        let sample = |line: &str| {
            let mut cells = line.split(',');
            let at = Duration::from_secs_f64(cells.next()?.parse().ok()?);
            let mut count = || cells.next()?.parse().ok();
            Some(Sample { at, waiting: count()?, in_flight: count()?, delivered: count()? })
        };
        let lines = curve.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| sample(line).unwrap_or_else(|| panic!("no sample: {line}"))).collect()
    }

    /// The speed after each look.
    fn speeds(curve: &[Sample]) -> Vec<Option<f64>> {
        let mut rate = Rate::default();
        let observe = |sample: &Sample| {
            rate.observe(*sample);
            rate.speed()
        };
        curve.iter().map(observe).collect()
    }

    /// Messages a second and host, over the whole time in which there were more than hosts could hold.
    fn real_rate(curve: &[Sample], hosts: f64) -> f64 {
        let busy: Vec<_> = curve.iter().filter(|sample| sample.is_busy()).collect();
        let (first, last) = (busy[0], busy[busy.len() - 1]);
        (last.settled() - first.settled()) as f64 / (last.at - first.at).as_secs_f64() / hosts
    }

    /// What a host is taken for is what it does, within what the module says of it, however many there are and whether
    /// its guests compute or wait.
    #[test]
    fn observed_speeds_are_those_of_the_hosts() {
        for (name, curve, hosts) in [("one", ONE_HOST, 1.0), ("two", TWO_HOSTS, 2.0), ("waiting", WAITING_GUESTS, 1.0)]
        {
            let curve = samples(curve);
            let speed = speeds(&curve).into_iter().flatten().last().expect("a speed");
            let (taken_for, real) = (speed * PLACES as f64, real_rate(&curve, hosts));
            assert!((0.9..1.2).contains(&(taken_for / real)), "{name}: {taken_for} for {real}");
        }
    }

    /// In the middle of a burst as many replicas are asked for as would be done with the rest in time, within a factor of
    /// two from the first second on: the machine of the curves had other work too.
    #[test]
    fn replicas_follow_the_time_that_is_left() {
        for (name, curve, hosts) in [("one", ONE_HOST, 1.0), ("two", TWO_HOSTS, 2.0), ("waiting", WAITING_GUESTS, 1.0)]
        {
            let curve = samples(curve);
            let real = real_rate(&curve, hosts);
            for (sample, speed) in
                curve.iter().zip(speeds(&curve)).filter(|(sample, speed)| sample.is_busy() && speed.is_some())
            {
                let asked = replicas(sample.lag(), speed, PLACES, DRAIN, 10);
                let needed = sample.lag() as f64 / real / DRAIN.as_secs_f64();
                assert!((0.5..2.0).contains(&(asked / needed)), "{name} at {:?}: {asked} for {needed}", sample.at);
            }
        }
    }

    /// Hosts that have time to spare do not show how fast they could be.
    #[test]
    fn a_trickle_teaches_nothing() {
        let curve = samples(TRICKLE);
        assert!(curve.last().expect("samples").delivered > 100, "a trickle");
        assert!(speeds(&curve).iter().all(Option::is_none));
    }

    #[test]
    fn before_anything_is_known_messages_are_counted() {
        assert_eq!(replicas(2500, None, PLACES, DRAIN, 1000), 2.5);
        assert_eq!(replicas(2500, Some(0.5), 100, DRAIN, 1000), 5.0);
        assert_eq!(replicas(0, Some(0.5), PLACES, DRAIN, 1000), 0.0);
        assert_eq!(replicas(1, Some(1e9), PLACES, DRAIN, 1000), LEAST);
        assert_eq!(replicas(7, Some(1e-9), PLACES, DRAIN, 1000), 7.0);
    }

    /// A store that refuses everything is not the hosts' slowness: nothing is settled, and what is known stays.
    #[test]
    fn hosts_that_stand_still_keep_their_speed() {
        let mut rate = Rate::default();
        let sample = |at, delivered| Sample { at: Duration::from_secs(at), waiting: 9000, in_flight: 500, delivered };
        for sample in [sample(0, 500), sample(2, 1500), sample(4, 1500), sample(600, 1500)] {
            rate.observe(sample);
        }
        assert_eq!(rate.speed(), Some(1.0));
    }

    /// A consumer that was made again, or one whose hosts were all away, does not count the time before.
    #[test]
    fn a_window_holds_nothing_but_work() {
        let mut rate = Rate::default();
        let sample =
            |at, in_flight, delivered| Sample { at: Duration::from_secs(at), waiting: 9000, in_flight, delivered };
        for sample in [sample(0, 500, 500), sample(100, 0, 500), sample(200, 500, 1000), sample(202, 500, 2000)] {
            rate.observe(sample);
        }
        assert_eq!(rate.speed(), Some(1.0));
        for sample in [sample(300, 500, 500), sample(301, 500, 1000)] {
            rate.observe(sample);
        }
        assert_eq!(rate.speed(), Some(1.0));
    }

    /// Whatever was seen: nothing asks for no replicas and something for some, more messages for no fewer, and none
    /// for more than one for each message.
    #[test]
    fn replicas_are_monotone_and_bounded() {
        let looks = collection::vec((0..5000_u64, 0..1_000_000_u64, 0..100_000_u64, 0..1_000_000_u64), 0..20);
        let asked = (any::<u32>(), any::<u32>(), 1..10_000_u64, 1..604_800_000_u64, 1..10_000_u64);
        check("replicas", 2000, (looks, asked, option::of(1e-12..1e12)), |(looks, asked, given)| {
            let mut rate = Rate::default();
            let (mut at, mut delivered) = (0, 0);
            for (pause, waiting, in_flight, more) in looks {
                (at, delivered) = (at + pause, delivered + more);
                rate.observe(Sample { at: Duration::from_millis(at), waiting, in_flight, delivered });
                assert!(rate.speed().is_none_or(|speed| speed.is_finite() && speed > 0.0));
            }
            let (one, other, places, drain, threshold) = asked;
            let (less, more) = (one.min(other).into(), one.max(other).into());
            let of = |lag| replicas(lag, given.or(rate.speed()), places, Duration::from_millis(drain), threshold);
            assert_eq!(of(0), 0.0);
            assert!(of(less) <= of(more));
            assert!(more == 0 || (LEAST..=(more as f64).max(LEAST)).contains(&of(more)));
        });
    }
}
