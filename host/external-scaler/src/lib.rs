//! KEDA's protocol for external scalers: the messages, the service and its client.
//!
//! Names and numbers of the fields are KEDA's. Beside those calls it knows `StreamMetricSpec`, which is optional; who
//! does not have it answers `Unimplemented`, and KEDA does without.

use std::collections::HashMap;

/// Which object KEDA asks for, and what its trigger says.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ScaledObjectRef {
    /// The ScaledObject's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// The trigger's metadata, KEDA's own keys such as `scalerAddress` included.
    #[prost(map = "string, string", tag = "3")]
    pub scaler_metadata: HashMap<String, String>,
}

/// Whether there is anything to do: KEDA goes from zero to one replica, or back to zero.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct IsActiveResponse {
    /// Whether there is.
    #[prost(bool, tag = "1")]
    pub result: bool,
}

/// By which metrics the number of replicas is found.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricSpecResponse {
    /// Each may ask for more replicas; the highest number wins.
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

/// A metric, and how much of it one replica is for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricSpec {
    /// Its name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// How much, for versions of KEDA that know no fractions.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    /// How much; KEDA takes it if it is above zero.
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

/// Asks for the value of a metric.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricsRequest {
    /// Whose metric it is.
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    /// A name out of [`MetricSpec`].
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

/// The values that were asked for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GetMetricsResponse {
    /// One, in practice.
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

/// How much there is of a metric, for all replicas together.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricValue {
    /// Its name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// How much, for versions of KEDA that know no fractions.
    #[prost(int64, tag = "2")]
    pub metric_value: i64,
    /// How much; KEDA takes it if it is above zero.
    #[prost(double, tag = "3")]
    pub metric_value_float: f64,
}

pub use generated::{external_scaler_client, external_scaler_server};

#[allow(missing_docs, unused_qualifications, reason = "written by tonic-build")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/externalscaler.ExternalScaler.rs"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    /// A wrong number of a field would be noticed by nobody but KEDA: both sides here share the messages.
    #[test]
    fn messages_on_the_wire_are_as_keda_has_them() {
        let object = ScaledObjectRef {
            name: "n".into(),
            namespace: "s".into(),
            scaler_metadata: HashMap::from([("k".into(), "v".into())]),
        };
        let bytes = b"\x0a\x01n\x12\x01s\x1a\x06\x0a\x01k\x12\x01v";
        assert_eq!(object.encode_to_vec(), bytes);
        assert_eq!(IsActiveResponse { result: true }.encode_to_vec(), b"\x08\x01");
        let one = 1.0_f64.to_le_bytes();
        let spec = MetricSpec { metric_name: "m".into(), target_size: 7, target_size_float: 1.0 };
        let expected = [&b"\x0a\x01m\x10\x07\x19"[..], &one[..]].concat();
        assert_eq!(spec.encode_to_vec(), expected);
        let value = MetricValue { metric_name: "m".into(), metric_value: 7, metric_value_float: 1.0 };
        assert_eq!(value.encode_to_vec(), expected);
        let within = [&b"\x0a\x0e"[..], &expected[..]].concat();
        assert_eq!(GetMetricSpecResponse { metric_specs: vec![spec] }.encode_to_vec(), within);
        assert_eq!(GetMetricsResponse { metric_values: vec![value] }.encode_to_vec(), within);
        let request = GetMetricsRequest { scaled_object_ref: Some(object), metric_name: "m".into() };
        assert_eq!(request.encode_to_vec(), [&b"\x0a\x0e"[..], &bytes[..], &b"\x12\x01m"[..]].concat());
    }
}
