//! KEDA and Kubernetes' autoscaler, as far as they decide how many hosts there are: the decisions are pure, the clock is
//! the caller's.
//!
//! Sources: the autoscaling algorithm of the Kubernetes documentation (tolerance, stabilization, default policies), and
//! KEDA's scale handler (polling, cool-down, zero to one and back).

use std::collections::VecDeque;
use std::time::Duration;

/// What a ScaledObject and the cluster are set to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How often KEDA asks whether there is anything to do.
    pub polling_interval: Duration,
    /// How long there has to be nothing to do before KEDA goes to zero.
    pub cooldown: Duration,
    /// How often the autoscaler asks for the metric and decides.
    pub sync_period: Duration,
    /// For how long the autoscaler has to want fewer before there are fewer.
    pub stabilization: Duration,
    /// Most replicas.
    pub replicas_max: u32,
    /// Messages for each replica.
    pub lag_threshold: u64,
}

impl Default for Settings {
    /// KEDA's and Kubernetes' defaults, but for the numbers of replicas and messages, which are those of `shim/deploy`.
    fn default() -> Self {
        Self {
            polling_interval: Duration::from_secs(30),
            cooldown: Duration::from_secs(300),
            sync_period: Duration::from_secs(15),
            stabilization: Duration::from_secs(300),
            replicas_max: 30,
            lag_threshold: 1000,
        }
    }
}

/// How far the metric may be from its target without consequences.
const TOLERANCE: f64 = 0.1;

/// In one period the replicas may double, or become so many more.
const MORE_AT_ONCE: u32 = 4;

/// The autoscaler's memory.
#[derive(Clone, Debug, Default)]
pub struct Autoscaler {
    /// What it would have wanted, and when, within the stabilization window.
    wanted: VecDeque<(Duration, u32)>,
}

impl Autoscaler {
    /// How many replicas there should be instead of `replicas`, at least one, where the metric's total is `value` and each
    /// replica's share should be `target`.
    pub fn decide(&mut self, now: Duration, replicas: u32, value: f64, target: f64, settings: &Settings) -> u32 {
        let usage = value / (target * f64::from(replicas.max(1)));
        let wanted = if (usage - 1.0).abs() <= TOLERANCE { replicas } else { (value / target).ceil() as u32 };
        let most = (2 * replicas).max(replicas + MORE_AT_ONCE).min(settings.replicas_max);
        self.wanted.push_back((now, wanted));
        self.wanted.retain(|(at, _)| now.saturating_sub(*at) <= settings.stabilization);
        let highest = self.wanted.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted);
        let stable = if wanted >= replicas { wanted } else { highest.min(replicas) };
        stable.clamp(1, most)
    }

    /// Forgets what it wanted, as it does when there are none.
    pub fn reset(&mut self) {
        self.wanted.clear();
    }
}

/// Whether there are any replicas, which KEDA decides.
#[derive(Clone, Debug, Default)]
pub struct Activation {
    last_active: Option<Duration>,
}

impl Activation {
    /// How many replicas there should be instead of `replicas` when the trigger says whether there is anything to do.
    pub fn decide(&mut self, now: Duration, replicas: u32, is_active: bool, settings: &Settings) -> u32 {
        if is_active {
            self.last_active = Some(now);
            return replicas.max(1);
        }
        let idle = self.last_active.map_or(Duration::MAX, |last| now.saturating_sub(last));
        if idle >= settings.cooldown { 0 } else { replicas }
    }
}
