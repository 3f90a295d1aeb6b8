// Asks a key about a text: npm run example -- 127.0.0.1:8470 acme/reviews "Kept me dry all week."

import { status } from "@grpc/grpc-js";
import { PredictRequest } from "./gen/modelyard/v1/inference_service.js";
import { DataType } from "./gen/modelyard/v1/tensor.js";
import { call, Connection, errorDetails } from "./modelyard.js";

const [target = "127.0.0.1:8470", key = "acme/reviews", text = "Kept me dry all week."] =
  process.argv.slice(2);
const connection = new Connection(target);
try {
  const answer = await call(
    connection.inference,
    connection.inference.predict,
    PredictRequest.fromPartial({
      key,
      inputs: [
        {
          dataType: DataType.DATA_TYPE_TEXT,
          shape: [1n],
          content: { $case: "text", value: { values: [text] } },
        },
      ],
    }),
  );
  for (const { name, content } of answer.outputs) {
    if (content?.$case === "text") console.log(name, content.value.values);
  }
  console.log(`served by ${answer.served?.model} on ${answer.served?.device}`);
} catch (error) {
  const { code, reason, violations } = errorDetails(error);
  console.error(`${status[code]} ${reason}`, ...violations);
  process.exitCode = 1;
} finally {
  connection.close();
}
