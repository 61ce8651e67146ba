//! What the benchmark shares with its criterion bench and its tests.

pub mod contestants;
pub mod plot;
pub mod targets;
