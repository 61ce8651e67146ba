//! Tries properties on generated values: the same few in every test run, others for as long as `cargo xtask fuzz` says.
//!
//! A failure is shown with the smallest value that fails. It becomes an ordinary test beside the property.

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use std::env;
use std::time::{Duration, Instant};

pub use proptest::prelude::{Just, Strategy, any, prop_oneof};
pub use proptest::{collection, option, sample};

/// Says for how long to go on, in seconds; without it `cases` values are tried.
const SECONDS: &str = "MAILROOM_FUZZ_SECONDS";

/// Says which values are tried, a number; without it always the same.
const SEED: &str = "MAILROOM_FUZZ_SEED";

/// Most steps towards the smallest value that fails.
const SHRINK_MAX: u32 = 20_000;

/// Expects `property` to return, and not to panic, for `cases` values of `strategy`, or for as long as the environment
/// says.
///
/// # Panics
/// For one it does; the message has the seed, the smallest such value, and what the property said.
pub fn check<S: Strategy>(name: &str, cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let number = |variable| env::var(variable).ok().and_then(|text| text.parse::<u64>().ok());
    let (seed, time) = (number(SEED).unwrap_or(0), number(SECONDS).map(Duration::from_secs));
    let started = Instant::now();
    let mut tried = 0_u64;
    loop {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&tried.to_le_bytes());
        let config = Config { cases, failure_persistence: None, max_shrink_iters: SHRINK_MAX, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let outcome = runner.run(&strategy, |value| {
            property(value);
            Ok::<_, TestCaseError>(())
        });
        if let Err(failure) = outcome {
            panic!("{name}: with {SEED}={seed}, after {tried} cases and more: {failure}");
        }
        tried += u64::from(cases);
        if time.is_none_or(|time| started.elapsed() >= time) {
            break;
        }
    }
    println!("fuzz: {name}: {tried} cases in {:.1} s", started.elapsed().as_secs_f32());
}

/// What comes of `bytes` when someone has been at them: pieces taken out, put in, doubled, cut off, bits turned.
pub fn mutated(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let piece = collection::vec(any::<u8>(), 0..20);
    let change = (any::<sample::Index>(), any::<sample::Index>(), piece, 0..5_u8);
    collection::vec(change, 1..6).prop_map(move |changes| {
        let mut bytes = bytes.clone();
        for (one, other, piece, kind) in changes {
            let (one, other) = (one.index(bytes.len() + 1), other.index(bytes.len() + 1));
            let range = one.min(other)..one.max(other);
            match kind {
                0 => bytes.truncate(range.end),
                1 => drop(bytes.splice(range, piece)),
                2 => {
                    let copy = bytes[range.clone()].to_vec();
                    drop(bytes.splice(range.start..range.start, copy));
                }
                3 => drop(bytes.splice(one..one, piece)),
                _ => {
                    if let Some(byte) = bytes.get_mut(one) {
                        *byte ^= 1 << (other % 8);
                    }
                }
            }
        }
        bytes
    })
}
