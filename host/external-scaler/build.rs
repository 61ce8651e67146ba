//! Writes the service and its client from the list of calls below; the messages are in `src/lib.rs`.

use tonic_build::manual::{Builder, Method, Service};

fn main() {
    let call = |name: &str, route: &str, input: &str, output: &str| {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type(format!("crate::{input}"))
            .output_type(format!("crate::{output}"))
            .codec_path("tonic_prost::ProstCodec")
    };
    let service = Service::builder()
        .package("externalscaler")
        .name("ExternalScaler")
        .comment("What KEDA asks of a scaler.")
        .method(call("is_active", "IsActive", "ScaledObjectRef", "IsActiveResponse").build())
        .method(
            call("stream_is_active", "StreamIsActive", "ScaledObjectRef", "IsActiveResponse")
                .server_streaming()
                .build(),
        )
        .method(call("get_metric_spec", "GetMetricSpec", "ScaledObjectRef", "GetMetricSpecResponse").build())
        .method(call("get_metrics", "GetMetrics", "GetMetricsRequest", "GetMetricsResponse").build())
        .build();
    Builder::new().build_transport(false).compile(&[service]);
}
