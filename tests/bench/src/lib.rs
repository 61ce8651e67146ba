//! What the benchmark of instances and its criterion bench both measure.

pub mod contestants;
