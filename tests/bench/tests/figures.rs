//! What is made of figures: targets and pictures.

use bench::plot::svg;
use bench::targets::compare;
use serde_json::json;

#[test]
fn every_variant_that_was_measured_is_drawn() {
    let throughput =
        |rate: f64, cpu: f64| json!({ "median": { "messages_per_second": rate, "cpu_us_per_message": cpu } });
    let latency =
        json!({ "name": "native-handler", "median": { "p50_us": 300.0, "p99_us": 900.0, "p999_us": 12000.0 } });
    let cases = json!({
        "throughput": { "1 KiB": { "native": throughput(100_000.0, 12.0), "host": throughput(50_000.0, 18.5) } },
        "latency": { "2000": { "native": latency } },
    });
    let svg = svg(&cases, &[500, 2000]);
    assert_eq!(svg.matches("<rect").count(), 4);
    assert_eq!(svg.matches("<circle").count(), 3);
    for text in [">100000<", ">18.5 µs<", ">300 µs, 900 µs, 12 ms<", "class=\"bar first\""] {
        assert!(svg.contains(text), "{text} in\n{svg}");
    }
}

#[test]
fn figures_are_compared_where_they_were_measured() {
    let of = |cpu: f64| json!({ "median": { "cpu_us_per_message": cpu } });
    let cases =
        json!({ "throughput": { "1 KiB": { "native": of(10.0), "host": of(16.0), "host-ordinary": of(21.0) } } });
    let (text, json) = compare(&cases);
    let met: Vec<_> =
        json.as_array().expect("a list").iter().map(|row| (row["measured"].clone(), row["met"].clone())).collect();
    assert_eq!(met, [(json!(1.6), json!(true)), (json!(2.1), json!(false))], "{text}");
}
